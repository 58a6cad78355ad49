"""Modules that hold weights and call ops."""

from ffn.nn.feed_forward import FeedForward, gated_hidden_dim

__all__ = ["FeedForward", "gated_hidden_dim"]
