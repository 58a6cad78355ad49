"""Functions on tensors: no weights, no modules."""

from ffn.ops.dropout import dropout
from ffn.ops.feed_forward import feed_forward

__all__ = ["dropout", "feed_forward"]
