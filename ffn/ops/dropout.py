"""Dropout that saves a seed for backward instead of the mask.

On a GPU a kernel draws the mask with Philox; elsewhere torch ops draw it (see `ffn.ops.dropout_mask`).
"""

from functools import cache
from types import ModuleType

import torch
from torch import Tensor, nn

from ffn.ops import dispatch, library, torch_modes
from ffn.ops import dropout_mask as mask
from ffn.ops.dropout_mask import draw_seed

_WIDTH = 1024  # columns of the kernel's tile


@cache
def _drawing(device: torch.device, dtype: torch.dtype) -> ModuleType:
    """Return the module that draws the mask for this device and dtype: kernels or `dropout_mask`."""
    kernels = device.type == "cuda" and dispatch.why_not_triton(device, dtype) is None
    return dispatch.module("triton") if kernels else mask


def noise(seed: Tensor, rows: int, cols: int, p: float, dtype: torch.dtype, row_start: int = 0) -> Tensor:
    """Return the factors of `dropped`: (rows, cols)."""
    if torch.compiler.is_compiling():
        return mask.noise(seed, rows, cols, p, dtype, row_start)
    return _drawing(seed.device, dtype).noise(seed, rows, cols, p, dtype, row_start)


def dropped(x: Tensor, seed: Tensor, p: float, row_start: int = 0) -> Tensor:
    """Return a new tensor: x (rows, cols) with dropped elements zeroed and the others scaled.

    row_start: the mask's row for the first row of x.
    """
    drawing = _drawing(x.device, x.dtype)
    if drawing is not mask:
        return drawing.drop(x, seed, p, row_start)
    y = x.clone(memory_format=torch.contiguous_format)
    mask.drop_((y,), seed, p, row_start)
    return y


def _drop(x: Tensor, seed: Tensor, p: float) -> Tensor:
    wide = x.is_cuda and x.numel() % _WIDTH == 0  # then tiles are full
    width = _WIDTH if wide else x.shape[-1] if x.ndim else 1
    return dropped(x.contiguous().view(-1, width), seed, p).view(x.shape)


library.define("drop(Tensor x, Tensor seed, float p) -> Tensor", _drop,
               fake=lambda x, seed, p: torch.empty(x.shape, dtype=x.dtype, device=x.device))  # fmt: skip


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, seed: Tensor, p: float) -> Tensor:
        ctx.save_for_backward(seed)
        ctx.p = p
        return torch.ops.ffn.drop(x, seed, p)

    @staticmethod
    def backward(ctx, *grads):
        (seed,) = ctx.saved_tensors
        return _Dropout.apply(grads[0], seed, ctx.p), None, None


def check_probability(name: str, p: float) -> None:
    """Raise ValueError unless 0 <= p < 1."""
    try:
        fits = 0.0 <= p < 1.0
    except TypeError:
        fits = False
    if not fits:
        raise ValueError(f"{name} must be a probability in [0, 1), got {p!r}")


def dropout(x: Tensor, p: float, training: bool = True) -> Tensor:
    """Zero elements with probability p and scale the others by 1 / (1 - p); save 8 bytes for backward.

    Args:
        x: any shape and floating dtype.
        p: in [0, 1), applied to within 2**-17.
        training: if False, return x itself. Default True.

    Returns:
        A tensor of x's shape and dtype.

    Raises:
        ValueError: p is not in [0, 1).

    Source: Srivastava et al. 2014.
    """
    check_probability("p", p)
    if not training or p == 0.0 or x.numel() == 0:
        return x
    if torch_modes.needs_reference() or type(x) not in (Tensor, nn.Parameter):
        return nn.functional.dropout(x, p)
    return _Dropout.apply(x, draw_seed(x.device), p)
