"""Hugging Face: its configurations as TransformerConfig, its names and packings of weights as views."""

from ffn.interop.hf.mlp import GPT2MLP, LlamaMLP
from ffn.interop.hf.register import register_with_transformers, unregister_with_transformers

__all__ = ["GPT2MLP", "LlamaMLP", "register_with_transformers", "unregister_with_transformers"]
