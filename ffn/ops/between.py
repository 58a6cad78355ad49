"""What stands between the two products of a block: h = dropout(act(gate) * up), or dropout(act(up)) plain."""

from typing import NamedTuple

from torch import Tensor

from ffn.activations import Activation


class Between(NamedTuple):
    """The activation, and the dropout behind it.

    seed (1,) int64, or None without dropout. row_start: row of the dropout mask of the first token.
    """

    activation: Activation
    seed: Tensor | None = None
    p: float = 0.0
    row_start: int = 0


class Needs(NamedTuple):
    """Results of the pass back that are asked for beside the gradients of the preactivations.

    h: the hidden values. up_bias, gate_bias: the column sums of the two gradients.
    """

    h: bool
    up_bias: bool
    gate_bias: bool
