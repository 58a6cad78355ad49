"""Hugging Face: its configurations as TransformerConfig, its names and packings of weights as views."""
