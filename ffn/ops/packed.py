"""Linears for decoding on the CPU: the weight once in oneDNN's own layout, which streams at memory speed.

One token at a time, a product is bound by reading its weight; the usual routines read it at half the speed
of the memory. The packed copy doubles the weight's memory for as long as it is kept. Its sums run in one
chain: in float32 their rounding error is some 2.5 times that of F.linear.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ffn.ops import dispatch

_WORTH_PACKING = 1 << 18  # elements; below, the call costs more than the reading


def pack_linear(weight: Tensor, bias: Tensor | None) -> Callable[..., Tensor] | None:
    """x (..., in) -> x weight^T + bias (..., out) from a packed copy, or None where that would not be faster.

    Args:
        weight: (out, in), float32 or bfloat16 on the CPU. bias: (out).

    The result takes the place of a module's forward; what else the module is given, it ignores.
    """
    if weight.numel() < _WORTH_PACKING or not dispatch.packs(weight):
        return None
    packed = torch.ops.mkldnn._reorder_linear_weight.default(weight.detach(), 1)
    bias = None if bias is None else bias.detach()
    product = torch.ops.mkldnn._linear_pointwise.default
    return lambda x, *_: product(x, packed, bias, "none", [], "")
