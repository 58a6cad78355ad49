"""ffn: the feed-forward block of the transformer, and a decoder built from it."""

from ffn.nn import FeedForward, gated_hidden_dim
from ffn.ops import feed_forward

__all__ = ["FeedForward", "feed_forward", "gated_hidden_dim"]
