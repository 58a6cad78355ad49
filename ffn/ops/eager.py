"""The backend in torch ops: the CPU's, and that of every case no kernel takes.

A backend is a module with `linear_pre` (the first product), `activate` (activation, gate, dropout) and
`linear_dact` (the product with the second weight and back through them). What lies between the products is one opaque op each way
under torch.compile, so that the compiler saves the preactivation and not the activated value with it.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F

from ffn import activations
from ffn.activations import Activation
from ffn.ops import library
from ffn.ops.dropout import drop_


@contextmanager
def onednn_float32() -> Iterator[None]:
    """Send float32 products on the CPU to oneDNN instead of MKL.

    The setting permits bfloat16 inside the product, which oneDNN uses only where the CPU has the tiles for it;
    dispatch asks for it only where float32 stays float32.
    """
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def linear_pre(
    x: Tensor, up: Tensor, up_bias: Tensor | None, gate: Tensor | None, gate_bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """(pre, pre_gate), each (N, H): the first product."""
    return F.linear(x, up, up_bias), None if gate is None else F.linear(x, gate, gate_bias)


def linear_dact(
    dy: Tensor, down: Tensor, pre: Tensor, pre_gate: Tensor | None,
    activation: Activation, seed: Tensor | None, p: float, row_start: int,
) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
    """(dpre, dpre_gate, h), each (N, H): the gradients of the preactivations, and h rebuilt from them."""
    dh = dy @ down
    if torch.compiler.is_compiling():
        dpre, dgate, h = torch.ops.ffn.dactivate(dh, pre, pre_gate, seed, activation.name, p, row_start)
        return dpre, (None if pre_gate is None else dgate), h
    return _dactivate_(dh, pre, pre_gate, activation, seed, p, row_start)


def activate(
    pre: Tensor, pre_gate: Tensor | None, activation: Activation, seed: Tensor | None, p: float, row_start: int = 0
) -> Tensor:
    """h (N, H) from the preactivations."""
    if torch.compiler.is_compiling():
        return torch.ops.ffn.activate(pre, pre_gate, seed, activation.name, p, row_start)
    return _activate(pre, pre_gate, activation, seed, p, row_start)


def _activate(pre, pre_gate, activation, seed, p, row_start) -> Tensor:
    h = activation(pre) if pre_gate is None else activation(pre_gate).mul_(pre)
    if seed is not None:
        drop_((h,), seed, p, row_start)
    return h


def _dactivate_(dh, pre, pre_gate, activation, seed, p, row_start) -> tuple[Tensor, Tensor | None, Tensor]:
    """Overwrites dh, which is the backward's own."""
    value = activation(pre if pre_gate is None else pre_gate)
    h = value if pre_gate is None else value * pre
    if seed is not None:
        drop_((h, dh), seed, p, row_start)
    if pre_gate is None:
        return activation.grad(dh, pre), None, h
    dpre = value.mul_(dh)
    return dpre, activation.grad(dh.mul_(pre), pre_gate), h


def _activate_op(pre, pre_gate, seed, activation, p, row_start):
    return _activate(pre, pre_gate, activations.TABLE[activation], seed, p, row_start)


def _dactivate_op(dh, pre, pre_gate, seed, activation, p, row_start):
    row = activations.TABLE[activation]
    dpre, dgate, h = _dactivate_(dh.clone(), pre, pre_gate, row, seed, p, row_start)
    return dpre, dpre.new_empty(0) if dgate is None else dgate, h


def _dactivate_fake(dh, pre, pre_gate, seed, activation, p, row_start):
    shape = pre.shape
    return pre.new_empty(shape), pre.new_empty(0 if pre_gate is None else shape), pre.new_empty(shape)


library.define(
    "activate(Tensor pre, Tensor? pre_gate, Tensor? seed, str activation, float p, SymInt row_start) -> Tensor",
    _activate_op,
    fake=lambda pre, pre_gate, seed, activation, p, row_start: pre.new_empty(pre.shape),
)
library.define(
    "dactivate(Tensor dh, Tensor pre, Tensor? pre_gate, Tensor? seed, str activation, float p, SymInt row_start)"
    " -> (Tensor, Tensor, Tensor)",
    _dactivate_op,
    fake=_dactivate_fake,
)
