"""Matrix products of a Linear: by torch, or by oneDNN where that is faster on this CPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

import torch
from torch import Tensor
from torch.nn import functional as F

from ffn.ops import hardware

# Multiply-adds from which oneDNN's set-up is repaid: in float32 by a faster product; in bfloat16, which
# F.linear hands to oneDNN too, only by the bias that oneDNN adds within the product.
_WORTH_ONEDNN = {torch.float32: 1 << 23, torch.bfloat16: 1 << 28}

# The terms that oneDNN may add up in a row in float32. Its rounding grows with their number and MKL's, which
# adds 192 at a time, does not: 1.3 to 1.7 times MKL's at 384, from 512 on twice and more.
_LONGEST_SUM = 384


def in_onednn(x: Tensor) -> bool:
    """True if products with x gain by oneDNN on this CPU."""
    if not x.is_cpu or torch.compiler.is_compiling():
        return False
    if x.dtype == torch.float32:
        return hardware.float32_faster_in_onednn()
    return x.dtype == torch.bfloat16 and hardware.bfloat16_in_onednn()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x weight^T + bias, (N, in) -> (N, out). oneDNN adds the bias within the product.

    F.linear writes the bias to the output before the product. oneDNN would read a strided bias as contiguous.
    """
    gains = x.dtype == torch.float32 if bias is None else bias.is_contiguous()
    if not gains or x.shape[0] * weight.numel() < _WORTH_ONEDNN.get(x.dtype, 0) or not in_onednn(x):
        return F.linear(x, weight, bias)
    if x.dtype != torch.float32 or x.shape[1] <= _LONGEST_SUM:
        return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
    if x.shape[0] == 1:  # no faster in pieces
        return F.linear(x, weight, bias)
    with float32_in_onednn():
        y = product(x, weight.t())
    return y if bias is None else y.add_(bias)


def product(a: Tensor, b: Tensor, out: Tensor | None = None, add: bool = False) -> Tensor:
    """a (M, K) @ b (K, N), written over `out` or added to it; in oneDNN a piece of K at a time.

    By addmm, since torch's FlopCounterMode does not count addmm_.
    """
    if not _within or a.dtype != torch.float32 or a.shape[1] <= _LONGEST_SUM:
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


def is_transposed(weight: Tensor) -> bool:
    """True if a weight (out, in) lies in memory as (in, out), as GPT-2's do."""
    return weight.stride(0) == 1 < weight.stride(1)


def weight_gradient(dz: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """dz^T x, (out, in), of dz (N, out) and x (N, in); laid out as the weight, or autograd would copy it."""
    if is_transposed(weight):
        return product(x.t(), dz).t()
    return product(dz.t(), x)


_lock, _within, _before = Lock(), 0, "none"


@contextmanager
def float32_in_onednn() -> Iterator[None]:
    """Send plain float32 products on the CPU to oneDNN instead of MKL.

    The setting permits bfloat16 within a product, which oneDNN uses only where the CPU has the tiles for it;
    `hardware.float32_faster_in_onednn` is True only where float32 stays float32. The setting belongs to the
    process: of the threads within at one time the first sets it and the last restores it.
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
    """True if float32 products of x (N, in) with such a weight repay oneDNN's set-up; one row never does."""
    N = x.shape[0]
    worth = N > 1 and x.dtype == torch.float32 and N * weight.numel() >= _WORTH_ONEDNN[torch.float32]
    return worth and in_onednn(x)
