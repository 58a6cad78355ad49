"""Attention over short sequences on the CPU: the whole matrix of scores beats torch's flash kernel there.

Up to a few hundred tokens the scores fit the caches, and plain products with a softmax between take half the
time of the tiled kernel, forward and backward. The weights p (B, Q, T, T) are kept for backward, so it is
done only while they are no larger than q, k and v together.

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

_SHORT, _SHORT_IN_MKL = 256, 128  # tokens, up to which the whole matrix was measured to be faster


def attend(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    """softmax(q k^T / sqrt(C)) v over (B, Q, T, C), the same T for all three; k and v may have fewer heads.

    While training short float32 sequences on the CPU, by the rule above; otherwise through torch's
    scaled_dot_product_attention, which is the same function.

    Source: Vaswani et al. 2017, section 3.2.1.
    """
    if _short(q, k):
        return ShortAttentionRule.apply(q, k, v, causal)
    gqa = bool(q.shape[1] != k.shape[1])  # torch.jit.trace has tensors for sizes
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=gqa)


def _short(q: Tensor, k: Tensor) -> bool:
    if torch.compiler.is_compiling() or q.device.type != "cpu" or q.dtype != torch.float32:
        return False
    if torch.is_autocast_enabled("cpu"):  # which would take the products to another dtype
        return False
    limit = _SHORT if hardware.float32_faster_in_onednn() else _SHORT_IN_MKL
    return (
        1 < q.shape[2] <= min(limit, 3 * q.shape[3])
        and q.shape == k.shape
        and torch.is_grad_enabled()
        and type(q) is Tensor
        and not torch_modes.needs_textbook()
    )


def _products():
    return float32_in_onednn() if hardware.float32_faster_in_onednn() else nullcontext()


def _textbook(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
    """(y, p) from q, k, v (n, T, C)."""
    scores = torch.bmm(q, k.transpose(1, 2)) * (1.0 / math.sqrt(q.shape[-1]))
    if causal:
        T = q.shape[1]
        scores = scores + scores.new_full((T, T), -math.inf).triu_(1)
    weights = torch.softmax(scores, -1)
    return torch.bmm(weights, v), weights


def _heads(*tensors: Tensor) -> list[Tensor]:
    """(B, Q, T, C) as (n, T, C), in memory of their own where the strides ask for it."""
    return [t.reshape(-1, *t.shape[-2:]) for t in tensors]


class ShortAttentionRule(torch.autograd.Function):
    """The rule at the head of this file."""

    @staticmethod
    def forward(ctx, q, k, v, causal: bool):
        with _products():
            y, weights = _textbook(*_heads(q, k, v), causal=causal)
        ctx.save_for_backward(q, k, v, weights)
        ctx.causal = causal
        return y.view(q.shape)

    @staticmethod
    def backward(ctx, *grads):
        with torch.autocast("cpu", enabled=False):  # backward may be called where autocast is on
            return *_backward(ctx, *grads), None


def _backward(ctx, dy: Tensor) -> list[Tensor]:
    """dq, dk, dv (B, Q, T, C)."""
    q, k, v, weights = ctx.saved_tensors
    shape = q.shape
    if torch_modes.wants_autograd(dy):

        def formula(*inputs: Tensor) -> Tensor:
            return _textbook(*_heads(*inputs), causal=ctx.causal)[0].view(shape)

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
