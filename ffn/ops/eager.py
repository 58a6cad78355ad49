"""The backend in torch ops: the CPU's, and that of every case no kernel takes.

A backend is a module with `linear_pre` (the first product), `activate` (activation, gate, dropout) and
`linear_dact` (back through the second product and through them). What lies between the products is one opaque
op each way under torch.compile, so that the compiler saves the preactivation and not the activated value too.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

import torch
from torch import Tensor
from torch.nn import functional as F

from ffn import activations
from ffn.activations import Activation
from ffn.ops import library
from ffn.ops.dropout import drop_

# Multiply-adds from which oneDNN's set-up is repaid: in float32 by a faster product; in bfloat16, which
# F.linear hands to oneDNN too, only by the saved pass over the output.
_WORTH_ONEDNN = {torch.float32: 1 << 22, torch.bfloat16: 1 << 28}


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, onednn: bool) -> Tensor:
    """x (N, in) -> (N, out). oneDNN adds the bias within the product, where F.linear writes it out before."""
    gains = bias is not None or x.dtype == torch.float32
    if onednn and gains and x.shape[0] * weight.numel() >= _WORTH_ONEDNN[x.dtype]:
        return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


_lock, _within, _before = Lock(), 0, "none"


@contextmanager
def float32_in_onednn() -> Iterator[None]:
    """Send plain float32 products on the CPU to oneDNN instead of MKL.

    The setting permits bfloat16 within a product, which oneDNN uses only where the CPU has the tiles for it;
    dispatch asks for it only where float32 stays float32. It belongs to the process: of the threads that are
    within at one time the first sets it and the last puts back what was there.
    """
    global _within, _before
    matmul = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]
    with _lock:
        if _within == 0:
            _before = matmul.fp32_precision
            matmul.fp32_precision = "bf16"
        _within += 1
    try:
        yield
    finally:
        with _lock:
            _within -= 1
            if _within == 0:
                matmul.fp32_precision = _before


def linear_pre(
    x: Tensor, up: Tensor, up_bias: Tensor | None, gate: Tensor | None, gate_bias: Tensor | None, onednn: bool
) -> tuple[Tensor, Tensor | None]:
    """(pre, pre_gate), each (N, H): the first product."""
    pre = linear(x, up, up_bias, onednn)
    return pre, None if gate is None else linear(x, gate, gate_bias, onednn)


def after(x: Tensor, event: Tensor) -> Tensor:
    """x, which under torch.compile exists only once `event` does.

    The compiler would otherwise merge the product that backward repeats with forward's, and save its result.
    """
    return torch.ops.ffn.after(x, event) if torch.compiler.is_compiling() else x


def linear_dact(
    dy: Tensor, down: Tensor, pre: Tensor, pre_gate: Tensor | None,
    activation: Activation, seed: Tensor | None, p: float, row_start: int, need_down: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """(dpre, dpre_gate, ddown), dpre and dpre_gate (N, H), ddown (O, H): back through the second product."""
    if torch.compiler.is_compiling():
        dh = dy @ down
        dpre, dgate, h = torch.ops.ffn.dactivate(dh, pre, pre_gate, seed, activation.name, p, row_start)
        return dpre, (None if pre_gate is None else dgate), (dy.t() @ h if need_down else None)
    value = activation(pre if pre_gate is None else pre_gate)
    h = value if pre_gate is None else value * pre
    if seed is None:
        ddown = dy.t() @ h if need_down else None
        dh = torch.mm(dy, down, out=h)  # h is done with
    else:
        dh = dy @ down
        drop_((h, dh), seed, p, row_start)  # one mask for both
        ddown = dy.t() @ h if need_down else None
    return *_through(activation, dh, value, pre, pre_gate), ddown


def activate(
    pre: Tensor,
    pre_gate: Tensor | None,
    activation: Activation,
    seed: Tensor | None,
    p: float,
    row_start: int = 0,
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
    """(dpre, dpre_gate, h); overwrites dh, which is the backward's own."""
    value = activation(pre if pre_gate is None else pre_gate)
    h = value if pre_gate is None else value * pre
    if seed is not None:
        drop_((h, dh), seed, p, row_start)
    dpre, dgate = _through(activation, dh, value, pre, pre_gate)
    return dpre, dgate, h


def _through(activation, dh, value, pre, pre_gate) -> tuple[Tensor, Tensor | None]:
    """(dpre, dpre_gate), written over dh and, when gated, over value."""
    if pre_gate is None:
        return activation.grad_(dh, pre), None
    dpre = value.mul_(dh)
    return dpre, activation.grad_(dh.mul_(pre), pre_gate)


def _activate_op(pre, pre_gate, seed, activation, p, row_start):
    return _activate(pre, pre_gate, activations.TABLE[activation], seed, p, row_start)


def _dactivate_op(dh, pre, pre_gate, seed, activation, p, row_start):
    row = activations.TABLE[activation]
    dpre, dgate, h = _dactivate_(dh.clone(), pre, pre_gate, row, seed, p, row_start)
    return dpre, dpre.new_empty(0) if dgate is None else dgate, h


def _dactivate_fake(dh, pre, pre_gate, seed, activation, p, row_start):
    shape = pre.shape
    return pre.new_empty(shape), pre.new_empty(0 if pre_gate is None else shape), pre.new_empty(shape)


_ARGUMENTS = "Tensor pre, Tensor? pre_gate, Tensor? seed, str activation, float p, SymInt row_start"

library.define(
    f"activate({_ARGUMENTS}) -> Tensor",
    _activate_op,
    fake=lambda pre, pre_gate, seed, activation, p, row_start: pre.new_empty(pre.shape),
)
library.define(
    f"dactivate(Tensor dh, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
    _dactivate_op,
    fake=_dactivate_fake,
)
library.define(
    "after(Tensor x, Tensor event) -> Tensor",
    lambda x, event: x.clone(),
    fake=lambda x, event: torch.empty_like(x),
)
