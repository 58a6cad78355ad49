"""The step between the products: h = dropout(act(gate) * up) when gated, dropout(act(up)) when plain."""

from typing import NamedTuple

from torch import Tensor

from ffn.activations import Activation


class Between(NamedTuple):
    """The activation and the dropout that follows it.

    seed: (1,) int64, or None without dropout. p: the probability to drop a hidden value. row_start: the
    dropout mask's row for the first token.
    """

    activation: Activation
    seed: Tensor | None = None
    p: float = 0.0
    row_start: int = 0


class Needs(NamedTuple):
    """Flags for the results that the pass back returns besides the gradients of the preactivations.

    h: the hidden values. up_bias, gate_bias: the column sums of dpre and dpre_gate.
    """

    h: bool
    up_bias: bool
    gate_bias: bool
