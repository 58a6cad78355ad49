"""Attention for short sequences on the CPU: plain matmuls beat torch's flash kernel there.

Up to a few hundred tokens the scores fit the caches, and two matmuls with a softmax between them take half
the time of the tiled kernel, forward and backward. The weights p (B, Q, T, T) are saved for backward, so this
path is taken only while p is no larger than q, k and v together.

    s = q k^T / sqrt(C)    p = softmax(s)    y = p v
    dv = p^T dy    dp = dy v^T    ds = p * (dp - rowsum(p * dp))
    dq = ds k / sqrt(C)    dk = ds^T q / sqrt(C)
"""

import math
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F

from ffn.ops import hardware, torch_modes
from ffn.ops.matmul import float32_in_onednn

_SHORT, _SHORT_IN_MKL = 256, 128  # most tokens for which plain matmuls measured faster


def attend(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    """Return softmax(q k^T / sqrt(C)) v.

    In training, short float32 sequences on the CPU use `ShortAttentionRule`. All other inputs use torch's
    scaled_dot_product_attention, which computes the same function.

    Shape:
        q, k, v: (B, Q, T, C), with the same T; k and v may have fewer heads.

    Source: Vaswani et al. 2017, section 3.2.1.
    """
    if _short(q, k):
        return ShortAttentionRule.apply(q, k, v, causal)
    gqa = bool(q.shape[1] != k.shape[1])  # bool(), since torch.jit.trace makes sizes tensors
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=gqa)


def _short(q: Tensor, k: Tensor) -> bool:
    if torch.compiler.is_compiling() or q.device.type != "cpu" or q.dtype != torch.float32:
        return False
    if torch.is_autocast_enabled("cpu"):  # it would run the matmuls in another dtype
        return False
    limit = _SHORT if hardware.float32_faster_in_onednn() else _SHORT_IN_MKL
    return (
        1 < q.shape[2] <= min(limit, 3 * q.shape[3])
        and q.shape == k.shape
        and torch.is_grad_enabled()
        and type(q) is Tensor
        and not torch_modes.needs_reference()
    )


def _products():
    return float32_in_onednn() if hardware.float32_faster_in_onednn() else nullcontext()


def _reference(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
    """Return (y, p) for q, k, v (n, T, C)."""
    scores = torch.bmm(q, k.transpose(1, 2)) * (1.0 / math.sqrt(q.shape[-1]))
    if causal:
        T = q.shape[1]
        scores = scores + scores.new_full((T, T), -math.inf).triu_(1)
    weights = torch.softmax(scores, -1)
    return torch.bmm(weights, v), weights


def _heads(*tensors: Tensor) -> list[Tensor]:
    """Reshape each (B, Q, T, C) to (B * Q, T, C); copies where the strides require it."""
    return [t.reshape(-1, *t.shape[-2:]) for t in tensors]


class ShortAttentionRule(torch.autograd.Function):
    """The formulas in the docstring of this file."""

    @staticmethod
    def forward(ctx, q, k, v, causal: bool):
        with _products():
            y, weights = _reference(*_heads(q, k, v), causal=causal)
        ctx.save_for_backward(q, k, v, weights)
        ctx.causal = causal
        return y.view(q.shape)

    @staticmethod
    def backward(ctx, *grads):
        with torch.autocast("cpu", enabled=False):  # backward may run under autocast
            return *_backward(ctx, *grads), None


def _backward(ctx, dy: Tensor) -> list[Tensor]:
    """Return dq, dk, dv (B, Q, T, C)."""
    q, k, v, weights = ctx.saved_tensors
    shape = q.shape
    if torch_modes.wants_autograd(dy):

        def formula(*inputs: Tensor) -> Tensor:
            return _reference(*_heads(*inputs), causal=ctx.causal)[0].view(shape)

        return torch_modes.autograd_gradients(formula, (q, k, v), ctx.needs_input_grad[:3], dy)
    dy, q, k, v = _heads(dy, q, k, v)
    with _products():
        dv = torch.bmm(weights.transpose(1, 2), dy)
        dweights = torch.bmm(dy, v.transpose(1, 2))
        softmax_backward = torch._softmax_backward_data  # pyright: ignore[reportPrivateImportUsage]
        dscores = softmax_backward(dweights, weights, -1, weights.dtype)
        dscores.mul_(1.0 / math.sqrt(q.shape[-1]))
        dq, dk = torch.bmm(dscores, k), torch.bmm(dscores.transpose(1, 2), q)
    return [t.view(shape) for t in (dq, dk, dv)]
