"""How the block runs: the options of `ffn.feed_forward`, together."""

from typing import NamedTuple

from ffn.activations import Activation


class Options(NamedTuple):
    """The options of `feed_forward`, which explains them; p is the dropout's probability."""

    activation: str | Activation
    p: float
    save: str
    chunk_tokens: int | None
    backend: str
