"""The backend in torch ops: the CPU's, and that of every case no kernel takes.

A backend is a module with `linear_act` (first product, activation, gate, dropout), `linear` (second product),
`linear_dact` (back through the second product and the activation), the parts `linear_pre`, `activate` and
`dactivate_`, and `noise` (the factors of its dropout).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

import torch
from torch import Tensor
from torch.nn import functional as F

from ffn.activations import Activation
from ffn.ops.dropout_mask import drop_
from ffn.ops.dropout_mask import noise as noise
from ffn.ops.library import is_transposed

# Multiply-adds from which oneDNN's set-up is repaid: in float32 by a faster product; in bfloat16, which
# F.linear hands to oneDNN too, only by the saved pass over the output.
_WORTH_ONEDNN = {torch.float32: 1 << 23, torch.bfloat16: 1 << 28}

# The terms that oneDNN may add up in a row in float32. Its rounding grows with their number and MKL's, which
# adds 192 at a time, does not: 1.3 to 1.7 times MKL's at 384, from 512 on twice and more.
_LONGEST_SUM = 384


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, onednn: bool) -> Tensor:
    """x (N, in) -> (N, out). oneDNN adds the bias within the product, where F.linear writes it out before.

    A strided bias it would read as if it were contiguous.
    """
    gains = x.dtype == torch.float32 if bias is None else bias.is_contiguous()
    if not onednn or not gains or x.shape[0] * weight.numel() < _WORTH_ONEDNN[x.dtype]:
        return F.linear(x, weight, bias)
    if x.dtype != torch.float32 or x.shape[1] <= _LONGEST_SUM:
        return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
    if x.shape[0] == 1:  # in pieces no faster
        return F.linear(x, weight, bias)
    with float32_in_onednn():
        y = product(x, weight.t())
    return y if bias is None else y.add_(bias)


def product(a: Tensor, b: Tensor, out: Tensor | None = None, add: bool = False) -> Tensor:
    """a (M, K) @ b (K, N), written over `out` or added to it; in oneDNN a piece of K at a time.

    By addmm, since torch's FlopCounterMode passes over addmm_.
    """
    if torch.compiler.is_compiling() or not _within or a.dtype != torch.float32 or a.shape[1] <= _LONGEST_SUM:
        return torch.addmm(out, a, b, out=out) if add and out is not None else torch.mm(a, b, out=out)
    K = a.shape[1]
    pieces = -(-K // max(_LONGEST_SUM, K // 768 * 64))  # some 12 at most, where MKL adds up more
    step = -(-K // (64 * pieces)) * 64  # of one size, since a short one is slow
    for k in range(0, K, step):
        piece = a[:, k : k + step], b[k : k + step]
        if out is not None and (add or k > 0):
            torch.addmm(out, *piece, out=out)
        else:
            out = torch.mm(*piece, out=out)
    assert out is not None
    return out


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


def repays_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether float32 products with x (N, in) and such a weight repay oneDNN's set-up; one row never does."""
    N = x.shape[0]
    return N > 1 and N * weight.numel() >= _WORTH_ONEDNN[torch.float32]


def weight_gradient(dy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """dy^T x, (O, D), of a linear's dy (N, O) and x (N, D), laid out as its weight."""
    if is_transposed(weight):
        return product(x.t(), dy).t()
    return product(dy.t(), x)


def linear_act(
    x: Tensor, up: Tensor, up_bias: Tensor | None, gate: Tensor | None, gate_bias: Tensor | None,
    activation: Activation, seed: Tensor | None, p: float, row_start: int, onednn: bool, keep: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """(h, pre, pre_gate), each (N, H); the preactivations are wanted only if `keep`."""
    pre, pre_gate = linear_pre(x, up, up_bias, gate, gate_bias, onednn)
    return activate(pre, pre_gate, activation, seed, p, row_start), pre, pre_gate


def linear_pre(
    x: Tensor, up: Tensor, up_bias: Tensor | None, gate: Tensor | None, gate_bias: Tensor | None,
    onednn: bool, after: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """(pre, pre_gate), each (N, H): the first product. `after` concerns compilers alone."""
    pre = linear(x, up, up_bias, onednn)
    return pre, None if gate is None else linear(x, gate, gate_bias, onednn)


def activate(
    pre: Tensor, pre_gate: Tensor | None,
    activation: Activation, seed: Tensor | None, p: float, row_start: int,
) -> Tensor:  # fmt: skip
    """h (N, H) from the preactivations."""
    h = activation(pre) if pre_gate is None else activation(pre_gate).mul_(pre)
    if seed is not None:
        drop_((h,), seed, p, row_start)
    return h


def linear_dact(
    dy: Tensor, down: Tensor, pre: Tensor, pre_gate: Tensor | None,
    activation: Activation, seed: Tensor | None, p: float, row_start: int,
    need_down: bool, need_up_bias: bool, need_gate_bias: bool, reuse: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Back through the second product and the activation: (dpre, dpre_gate, ddown, dup_bias, dgate_bias).

    dpre and dpre_gate (N, H), written over the preactivations if `reuse`; ddown (O, H), the biases' (H); None
    for what need_* does not ask for.
    """
    if seed is not None:
        dh = product(dy, down)
        dpre, dpre_gate, h = dactivate_(dh, pre, pre_gate, activation, seed, p, row_start, reuse)
        ddown = weight_gradient(dy, h, down) if need_down else None
    else:
        value = activation(pre if pre_gate is None else pre_gate)
        h = value if pre_gate is None else value * pre
        ddown = weight_gradient(dy, h, down) if need_down else None
        dh = product(dy, down, out=h)  # h is done with
        dpre, dpre_gate = _through(activation, dh, value, pre, pre_gate, reuse)
    dup_bias = dpre.sum(0) if need_up_bias else None
    dgate_bias = dpre_gate.sum(0) if need_gate_bias and dpre_gate is not None else None
    return dpre, dpre_gate, ddown, dup_bias, dgate_bias


def dactivate_(
    dh: Tensor, pre: Tensor, pre_gate: Tensor | None,
    activation: Activation, seed: Tensor | None, p: float, row_start: int, reuse: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
    """(dpre, dpre_gate, h), each (N, H); overwrites dh and, if `reuse`, the preactivations."""
    value = activation(pre if pre_gate is None else pre_gate)
    h = value if pre_gate is None else value * pre
    if seed is not None:
        drop_((h, dh), seed, p, row_start)  # one mask for both
    return *_through(activation, dh, value, pre, pre_gate, reuse), h


def _through(activation, dh, value, pre, pre_gate, reuse: bool) -> tuple[Tensor, Tensor | None]:
    """(dpre, dpre_gate), written over the preactivations if `reuse`, else over what is done with."""
    if pre_gate is None:
        return activation.grad(dh, pre, out=pre if reuse else dh), None
    into = pre_gate if reuse else torch.empty_like(dh)
    dpre_gate = activation.grad(dh, pre_gate, out=into).mul_(pre)
    return torch.mul(dh, value, out=pre if reuse else value), dpre_gate
