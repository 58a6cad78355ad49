"""The options of `ffn.ops.feed_forward` as one tuple."""

from typing import NamedTuple

from ffn.activations import Activation


class Options(NamedTuple):
    """The options of `ffn.ops.feed_forward`, documented there; p is `dropout`, the probability."""

    activation: str | Activation
    p: float
    save: str
    chunk_tokens: int | None
    backend: str
