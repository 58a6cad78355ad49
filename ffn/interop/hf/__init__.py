"""Hugging Face: its configurations as TransformerConfig, its names and packings of weights as views."""

from ffn.interop.hf.mlp import GPT2MLP, LlamaMLP

__all__ = ["GPT2MLP", "LlamaMLP"]
