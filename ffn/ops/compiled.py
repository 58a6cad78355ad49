"""The backend under torch.compile: products that the compiler sees, and between them one opaque op each way.

Were they seen through, the activation of forward and the one that backward repeats would be merged, and the
activated value saved along with the preactivation.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ffn import activations
from ffn.activations import Activation
from ffn.ops import eager, library
from ffn.ops.dropout_mask import noise as noise


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, onednn: bool) -> Tensor:
    """x (N, in) -> (N, out); the library is the compiler's choice."""
    return F.linear(x, weight, bias)


def linear_act(
    x: Tensor, up: Tensor, up_bias: Tensor | None, gate: Tensor | None, gate_bias: Tensor | None,
    activation: Activation, seed: Tensor | None, p: float, row_start: int, onednn: bool, keep: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """(h, pre, pre_gate), each (N, H)."""
    pre, pre_gate = linear_pre(x, up, up_bias, gate, gate_bias, onednn)
    return activate(pre, pre_gate, activation, seed, p, row_start), pre, pre_gate


def linear_pre(
    x: Tensor, up: Tensor, up_bias: Tensor | None, gate: Tensor | None, gate_bias: Tensor | None,
    onednn: bool, after: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """(pre, pre_gate), each (N, H): the first product, which waits for `after` to exist.

    A product that backward repeats would otherwise be merged with forward's, and its result saved.
    """
    x = x if after is None else torch.ops.ffn.after(x, after)
    return F.linear(x, up, up_bias), None if gate is None else F.linear(x, gate, gate_bias)


def activate(
    pre: Tensor, pre_gate: Tensor | None,
    activation: Activation, seed: Tensor | None, p: float, row_start: int,
) -> Tensor:  # fmt: skip
    """h (N, H) from the preactivations."""
    return torch.ops.ffn.activate(pre, pre_gate, seed, activation.name, p, row_start)


def linear_dact(
    dy: Tensor, down: Tensor, pre: Tensor, pre_gate: Tensor | None,
    activation: Activation, seed: Tensor | None, p: float, row_start: int,
    need_down: bool, need_up_bias: bool, need_gate_bias: bool, reuse: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """(dpre, dpre_gate, ddown, dup_bias, dgate_bias): back through the second product and the activation.

    What memory is used again is the compiler's choice.
    """
    back = torch.ops.ffn.dactivate(dy @ down, pre, pre_gate, seed, activation.name, p, row_start)
    dpre, dpre_gate, h = back
    ddown = dy.t() @ h if need_down else None
    dup_bias = dpre.sum(0) if need_up_bias else None
    dgate_bias = dpre_gate.sum(0) if need_gate_bias else None
    return dpre, None if pre_gate is None else dpre_gate, ddown, dup_bias, dgate_bias


def _activate(pre, pre_gate, seed, activation, p, row_start):
    return eager.activate(pre, pre_gate, activations.TABLE[activation], seed, p, row_start)


def _dactivate(dh, pre, pre_gate, seed, activation, p, row_start):
    row = activations.TABLE[activation]
    dpre, dpre_gate, h = eager.dactivate_(dh.clone(), pre, pre_gate, row, seed, p, row_start, reuse=False)
    return dpre, dpre.new_empty(0) if dpre_gate is None else dpre_gate, h


def _dactivate_fake(dh, pre, pre_gate, seed, activation, p, row_start):
    shape = pre.shape
    return pre.new_empty(shape), pre.new_empty(0 if pre_gate is None else shape), pre.new_empty(shape)


_ARGUMENTS = "Tensor pre, Tensor? pre_gate, Tensor? seed, str activation, float p, SymInt row_start"

library.define(
    f"activate({_ARGUMENTS}) -> Tensor",
    _activate,
    fake=lambda pre, pre_gate, seed, activation, p, row_start: pre.new_empty(pre.shape),
)
library.define(
    f"dactivate(Tensor dh, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
    _dactivate,
    fake=_dactivate_fake,
)
library.define(
    "after(Tensor x, Tensor event) -> Tensor",
    lambda x, event: x.clone(),
    fake=lambda x, event: torch.empty_like(x),
)
