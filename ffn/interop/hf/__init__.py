"""Hugging Face checkpoints: read configurations as TransformerConfig, and weights under our names."""
