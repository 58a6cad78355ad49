"""Packed copies of weights in int8, and the matmuls that round their inputs to int8 as well.

    x ~ s q / 127, q = round(127 x / s), s = max |x| of each token;  the same for each row of the weight

With a few tokens a matmul is bound by reading the weight; int8 reads a quarter of the bytes. Each token is
rounded by itself as it comes, so its result does not depend on the batch. Sums are exact, in int32.

oneDNN runs the matmuls. A single token goes to FBGEMM, if torch has it, with a second copy of the weight:
FBGEMM rounds the input inside the matmul, from its smallest value to its largest, which is faster.

Source: Dettmers et al. 2022, section 2 (a scale per token and row).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ffn.activations import GATES, TABLE
from ffn.ops import hardware
from ffn.packing.float_copies import NOTHING_FUSED, Packed, reason_against

_WIDEST = (2**31 - 1) // (255 * 127)  # the most terms that an int32 sum holds
_TINY = 1e-35  # rows and tokens below this count as zero, since 127 / s would be infinite
_MIDDLE = 128  # the zero of unsigned inputs; signed ones run a loop in oneDNN, a thousand times slower
_CUT = torch.tensor(
    _MIDDLE + 0.5, dtype=torch.float32, device="cpu"
)  # adds a half, since conversion to integers truncates
_LEAST, _MOST = (
    0.02,
    1e30,
)  # the range for FBGEMM: its steps are at least 6.1e-5, and it turns NaN into numbers


class Rows(NamedTuple):
    """An int8 copy of a weight (out, in).

    Attributes:
        values: the int8 values in oneDNN's layout.
        scales: (out), the step of the weight times the step of the input, over the token's s.
        zeros: (out), all zero.
        alone: FBGEMM's copy for a single token, with the bias if that is float32; None without FBGEMM.
    """

    values: Tensor
    scales: Tensor
    zeros: Tensor
    alone: Any


class Quantized(Packed):
    """Int8 copies of weights that are used together; see `Packed`. The biases are not rounded."""

    what = "int8 matmuls, weights and tokens rounded to 255 steps"

    @staticmethod
    def why_not(tensor: Tensor) -> str | None:
        """Return why this weight (out, in) or bias cannot be used in int8, or None if it can."""
        if tensor.ndim == 2 and tensor.shape[1] > _WIDEST:
            return f"{tensor.shape[1]} wide; int8 sums hold up to {_WIDEST} terms"
        return reason_against(tensor, "int8 matmuls take", hardware.int8_in_onednn())

    @staticmethod
    def copy(weight: Tensor, bias: Tensor | None) -> Rows:
        largest = weight.abs().amax(1).float().clamp_min_(_TINY)
        values = weight.div(largest[:, None]).mul_(127).round_().to(torch.int8)
        zeros = torch.zeros(len(weight), dtype=torch.int64, device="cpu")
        within = bias if bias is not None and bias.dtype == torch.float32 else None
        alone = hardware.fbgemm_layout(values, largest / 127, within) if hardware.int8_in_fbgemm() else None
        return Rows(torch.ops.onednn.qlinear_prepack.default(values, None), largest / 127**2, zeros, alone)

    def fit(self, x: Tensor) -> bool:
        return super().fit(x) and x.numel() > 0  # without tokens oneDNN loses the shape

    def linear(self, x: Tensor) -> Tensor:
        weight, bias = self.layouts
        return _matmul(*_rounded(x), weight, bias).to(x.dtype)

    def feed_forward(self, x: Tensor, activation: str) -> Tensor:
        up, down, gate, up_bias, down_bias, gate_bias = self.layouts
        name = GATES.get(activation, activation)
        first, bias = (up, up_bias) if gate is None else (gate, gate_bias)
        tokens = _rounded(x)
        h = _matmul(*tokens, first, bias)
        if name != "identity":
            h = TABLE[name](h)
        if gate is not None:
            h.mul_(_matmul(*tokens, up, up_bias))
        return _matmul(*_rounded(h), down, down_bias).to(x.dtype)


def _rounded(x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Round x (..., in); return its uint8 steps and the largest magnitude of each token (..., 1).

    A NaN or infinity in x is kept in the magnitude. If FBGEMM is to round, return x in float32, and None.
    """
    x = x.float()
    alone = x.ndim > 1 and x.numel() == x.shape[-1] and hardware.int8_in_fbgemm()
    if alone:  # the norm is faster to find than the largest value, and mostly decides
        token = x.view(-1)
        if _LEAST**2 * len(token) < token.dot(token).item() < _MOST:
            return x, None
    largest = x.abs().amax(-1, keepdim=True)
    if alone and _LEAST < largest.item() < _MOST:
        return x, None
    steps = torch.addcmul(_CUT, x, largest.clamp_min(_TINY).reciprocal_().mul_(127))
    return steps.to(torch.uint8), largest


def _matmul(values: Tensor, largest: Tensor | None, weight: Rows, bias: Tensor | None) -> Tensor:
    """Return x weight^T + bias, (..., out) in float32, for a rounded x."""
    if largest is None:
        y = torch.ops.quantized.linear_dynamic.default._op(values, weight.alone, False)  # saves a lookup
        return y if bias is None or bias.dtype == torch.float32 else y.add_(bias)
    kind = 1.0, 0, torch.float32  # of the output
    matmul = torch.ops.onednn.qlinear_pointwise.default
    y = matmul(values, 1.0, _MIDDLE, *weight[:3], None, *kind, *NOTHING_FUSED)
    return y.mul_(largest) if bias is None else torch.addcmul(bias.float(), y, largest)
