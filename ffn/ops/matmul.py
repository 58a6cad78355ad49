"""The matmuls of a Linear: in torch, or in oneDNN where that is faster on this CPU."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

import torch
from torch import Tensor
from torch.nn import functional as F

from ffn.ops import hardware

# The fewest multiply-adds for which oneDNN repays its set-up cost. In float32 the gain is a faster matmul. In
# bfloat16 F.linear calls oneDNN too, so the only gain is the bias, which oneDNN adds within the matmul.
_WORTH_ONEDNN = {torch.float32: 1 << 23, torch.bfloat16: 1 << 28}

# The longest sum that oneDNN computes at once in float32. Its rounding error grows with the number of terms;
# MKL's does not, since it adds 192 at a time. The error is 1.3 to 1.7 times MKL's at 384 terms, and twice or
# more from 512 on.
_LONGEST_SUM = 384


def in_onednn(x: Tensor) -> bool:
    """True if matmuls of x are faster in oneDNN on this CPU."""
    if not x.is_cpu or torch.compiler.is_compiling():
        return False
    if x.dtype == torch.float32:
        return hardware.float32_faster_in_onednn()
    return x.dtype == torch.bfloat16 and hardware.bfloat16_in_onednn()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x weight^T + bias, (N, in) -> (N, out). oneDNN adds the bias within the matmul.

    F.linear writes the bias to the output before the matmul. oneDNN would read a strided bias as contiguous.
    """
    gains = x.dtype == torch.float32 if bias is None else bias.is_contiguous()
    if not gains or x.shape[0] * weight.numel() < _WORTH_ONEDNN.get(x.dtype, 0) or not in_onednn(x):
        return F.linear(x, weight, bias)
    if x.dtype != torch.float32 or x.shape[1] <= _LONGEST_SUM:
        return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
    if x.shape[0] == 1:  # pieces are no faster for one row
        return F.linear(x, weight, bias)
    with float32_in_onednn():
        y = product(x, weight.t())
    return y if bias is None else y.add_(bias)


def product(a: Tensor, b: Tensor, out: Tensor | None = None, add: bool = False) -> Tensor:
    """Return a (M, K) @ b (K, N): written to `out` if given, or added to it if `add`.

    In oneDNN the sum over K is split into pieces of bounded length. It adds with addmm, since torch's
    FlopCounterMode does not count addmm_.
    """
    if not _within or a.dtype != torch.float32 or a.shape[1] <= _LONGEST_SUM:
        return torch.addmm(out, a, b, out=out) if add and out is not None else torch.mm(a, b, out=out)
    K = a.shape[1]
    pieces = -(-K // max(_LONGEST_SUM, K // 768 * 64))  # about 12 pieces at most
    step = -(-K // (64 * pieces)) * 64  # equal sizes, since a short piece is slow
    for k in range(0, K, step):
        piece = a[:, k : k + step], b[k : k + step]
        if out is not None and (add or k > 0):
            torch.addmm(out, *piece, out=out)
        else:
            out = torch.mm(*piece, out=out)
    assert out is not None
    return out


def is_transposed(weight: Tensor) -> bool:
    """True if a weight (out, in) is stored as (in, out), as GPT-2's weights are."""
    return weight.stride(0) == 1 < weight.stride(1)


def weight_gradient(dz: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Return dz^T x (out, in) for dz (N, out) and x (N, in), in the weight's layout to save a copy."""
    if is_transposed(weight):
        return product(x.t(), dz).t()
    return product(dz.t(), x)


_lock, _within, _before = Lock(), 0, "none"  # of the process: the setting has no thread


@contextmanager
def float32_in_onednn() -> Iterator[None]:
    """Run plain float32 matmuls on the CPU in oneDNN instead of MKL.

    The setting permits bfloat16 within a matmul, which oneDNN uses only where the CPU has AMX tiles;
    `hardware.float32_faster_in_onednn` is True only where float32 stays float32. The setting is global to the
    process: the first thread to enter sets it and the last to leave restores it.
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


def _leave_in_child() -> None:
    """Undo what other threads held when this process was forked: they do not exist here."""
    global _lock, _within
    _lock = Lock()
    if _within:
        _within = 0
        torch.backends.mkldnn.matmul.fp32_precision = _before  # pyright: ignore[reportAttributeAccessIssue]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_in_child)


def repays_onednn(x: Tensor, weight: Tensor) -> bool:
    """True if float32 matmuls of x (N, in) with this weight repay oneDNN's set-up cost; never for one row."""
    N = x.shape[0]
    worth = N > 1 and x.dtype == torch.float32 and N * weight.numel() >= _WORTH_ONEDNN[torch.float32]
    return worth and in_onednn(x)
