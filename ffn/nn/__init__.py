"""Modules that hold weights and call ops, in the order tokens meet them."""

from ffn.nn.feed_forward import FeedForward, gated_hidden_dim

__all__ = ["FeedForward", "gated_hidden_dim"]
