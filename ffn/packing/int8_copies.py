"""Products on the CPU from weights and inputs rounded to int8, and the block made of such products.

    x ~ s q / 127, q = round(127 x / s), s = max |x| of each token;  the same for each row of the weight

A few tokens are bound by reading the weights, of which a fourth is left. Each token is rounded by itself,
when it comes, so that it does not matter who else is in the batch. Sums are exact, in int32.

oneDNN takes the products. A token that comes alone goes to FBGEMM where torch has it, from a second copy of
the weight: it rounds within the product, from the least value to the largest, which is quicker.

Source: Dettmers et al. 2022, section 2 (a scale a token and a row).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ffn.activations import GATES, TABLE
from ffn.ops import hardware
from ffn.packing.float_copies import AS_IT_IS, Packed, refusal

_WIDEST = (2**31 - 1) // (255 * 127)  # terms of a sum that int32 holds
_TINY = 1e-35  # what is smaller throughout counts as zero, since 127 / s would be infinite
_MIDDLE = 128  # inputs are unsigned: for signed ones oneDNN has a loop, a thousand times slower
_CUT = torch.tensor(_MIDDLE + 0.5, dtype=torch.float32, device="cpu")  # conversion to integers cuts off
_LEAST, _MOST = 0.02, 1e30  # what FBGEMM may get: its steps are 6.1e-5 at least, and it makes numbers of NaN


class Rows(NamedTuple):
    """A weight (out, in) in the layouts of int8."""

    values: Tensor  # oneDNN's
    scales: Tensor  # (out), of a unit of the weight times a unit of the input, over the token's s
    zeros: Tensor  # (out)
    alone: Any  # FBGEMM's, with the bias if that is float32; None where it is not to be had


class Quantized(Packed):
    """Int8 copies of weights that are used together; see `Packed`. Biases stay as they are."""

    what = "int8 products, weights and tokens rounded to 255 steps"

    @staticmethod
    def why_not(tensor: Tensor) -> str | None:
        """Why this weight cannot be rounded and used, or this bias; None if it can."""
        if tensor.ndim == 2 and tensor.shape[1] > _WIDEST:
            return f"{tensor.shape[1]} wide; int8 sums hold up to {_WIDEST} terms"
        return refusal(tensor, "int8 products take", hardware.int8_in_onednn())

    @staticmethod
    def copy(weight: Tensor, bias: Tensor | None) -> Rows:
        largest = weight.abs().amax(1).float().clamp_min_(_TINY)
        values = weight.div(largest[:, None]).mul_(127).round_().to(torch.int8)
        zeros = torch.zeros(len(weight), dtype=torch.int64, device="cpu")
        within = bias if bias is not None and bias.dtype == torch.float32 else None
        alone = hardware.fbgemm_layout(values, largest / 127, within) if hardware.int8_in_fbgemm() else None
        return Rows(torch.ops.onednn.qlinear_prepack.default(values, None), largest / 127**2, zeros, alone)

    def fit(self, x: Tensor) -> bool:
        return super().fit(x) and x.numel() > 0  # of no tokens oneDNN forgets the shape

    def linear(self, x: Tensor) -> Tensor:
        weight, bias = self.layouts
        return _product(*_rounded(x), weight, bias).to(x.dtype)

    def feed_forward(self, x: Tensor, activation: str) -> Tensor:
        up, down, gate, up_bias, down_bias, gate_bias = self.layouts
        name = GATES.get(activation, activation)
        first, bias = (up, up_bias) if gate is None else (gate, gate_bias)
        tokens = _rounded(x)
        h = _product(*tokens, first, bias)
        if name != "identity":
            h = TABLE[name](h)
        if gate is not None:
            h.mul_(_product(*tokens, up, up_bias))
        return _product(*_rounded(h), down, down_bias).to(x.dtype)


def _rounded(x: Tensor) -> tuple[Tensor, Tensor | None]:
    """x (..., in) as steps from the middle, uint8, and the largest magnitude of each token (..., 1).

    A NaN or an infinity goes into the latter. Where FBGEMM will round: x itself in float32, and None.
    """
    x = x.float()
    alone = x.ndim > 1 and x.numel() == x.shape[-1] and hardware.int8_in_fbgemm()
    if alone:  # a norm is quicker to find than the largest, and mostly enough to know
        token = x.view(-1)
        if _LEAST**2 * len(token) < token.dot(token).item() < _MOST:
            return x, None
    largest = x.abs().amax(-1, keepdim=True)
    if alone and _LEAST < largest.item() < _MOST:
        return x, None
    steps = torch.addcmul(_CUT, x, largest.clamp_min(_TINY).reciprocal_().mul_(127))
    return steps.to(torch.uint8), largest


def _product(values: Tensor, largest: Tensor | None, weight: Rows, bias: Tensor | None) -> Tensor:
    """x weight^T + bias, (..., out) in float32, of x rounded."""
    if largest is None:
        y = torch.ops.quantized.linear_dynamic.default._op(values, weight.alone, False)  # spares a search
        return y if bias is None or bias.dtype == torch.float32 else y.add_(bias)
    kind = 1.0, 0, torch.float32  # of the output
    product = torch.ops.onednn.qlinear_pointwise.default
    y = product(values, 1.0, _MIDDLE, *weight[:3], None, *kind, *AS_IT_IS)
    return y.mul_(largest) if bias is None else torch.addcmul(bias.float(), y, largest)
