"""Packed copies of weights in float32 or bfloat16: oneDNN's own layout, and the matmuls that read it.

With a few tokens a matmul is bound by reading the weight, and the usual routines read at half the speed of
the memory. oneDNN's layout reads at full speed, and its matmul applies the activation before it writes. A
copy doubles the memory of its weight. Its sums run in longer chains: in float32 their rounding error is about
2.5 times that of F.linear.
"""

from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor

from ffn.activations import GATES, TABLE
from ffn.ops import hardware

Tensors = tuple[Tensor | None, ...]

_TOKENS = 512  # oneDNN chooses a layout for so many tokens; this one serves a single token best, too

# The activations that oneDNN fuses into a matmul, by its names. Its relu would turn NaN into 0.
NOTHING_FUSED = "none", [], ""
FUSED = {"silu": ("swish", [], ""), "gelu": ("gelu", [], "none"), "gelu_tanh": ("gelu", [], "tanh"),
         "sigmoid": ("sigmoid", [], ""), "tanh": ("tanh", [], ""), "identity": NOTHING_FUSED}  # fmt: skip


def reason_against(tensor: Tensor, reader: str, supported: bool) -> str | None:
    """Return why `reader` cannot take this weight or bias, or None if it can."""
    kind = f"{tensor.dtype} on {tensor.device.type}"
    if tensor.device.type != "cpu" or tensor.dtype not in (torch.float32, torch.bfloat16):
        return f"{kind}; {reader} float32 and bfloat16 on the CPU"
    if not supported:
        return f"{kind}, which oneDNN does not support on this processor or in this build of torch"
    if tensor.is_inference():
        return "an inference tensor, whose writes torch does not count; make it outside inference mode"
    return None if tensor.is_contiguous() else "strided; make it contiguous"  # oneDNN misreads a strided bias


class Packed:
    """Packed copies of weights that are used together, and the state of the weights when they were copied.

    Args:
        tensors: the weights (out, in), then their biases (out) in the same order; either may be None.
            `why_not` must be None for each. The biases are read where they are, not copied.
        joined: make one weight and one bias of all of them, for a single matmul. This copies the biases too.

    Attributes:
        layouts: the packed weights, then the biases, in the order of `tensors`.
        dtype, width: of an input x (..., width).
        heights: the output width of each weight.
    """

    what = "matmuls in oneDNN, from copies of the weights in its own layout"

    def __init__(self, tensors: Tensors, joined: bool = False):
        self.tensors = tensors
        self.present = [t for t in tensors if t is not None]
        self.state = _state(self.present)
        self.aliases = [t.detach() for t in self.present]  # keep the addresses from being reused
        self.dtype, self.width = self.present[0].dtype, self.present[0].shape[1:]
        self.heights = [t.shape[0] for t in self.present if t.ndim == 2]
        if joined:
            weights, biases = ([t for t in self.aliases if t.ndim == ndim] for ndim in (2, 1))
            tensors = torch.cat(weights), torch.cat(biases) if biases else None
        plain = [None if t is None else t.detach() for t in tensors]
        weights, biases = plain[: len(plain) // 2], plain[len(plain) // 2 :]
        copies = [None if w is None else self.copy(w, b) for w, b in zip(weights, biases, strict=True)]
        self.layouts: list[Any] = [*copies, *biases]

    @staticmethod
    def why_not(tensor: Tensor) -> str | None:
        """Return why oneDNN cannot pack this weight (out, in) or read this bias, or None if it can."""
        return reason_against(tensor, "oneDNN packs", hardware.packs(tensor.dtype))

    @staticmethod
    def copy(weight: Tensor, bias: Tensor | None) -> Any:
        """Return the packed copy of a weight (out, in) that is used with this bias (out)."""
        return torch.ops.mkldnn._reorder_linear_weight.default(weight, _TOKENS)

    def are_of(self, tensors: Tensors) -> bool:
        """Return whether these tensors are the ones that were copied, unchanged since.

        Seen are another tensor, other memory, shape, strides or dtype, and every write that torch counts.
        A write that torch does not count (through `.data`, numpy or a fused optimizer) is not seen.
        """
        return all(map(is_, tensors, self.tensors)) and _state(self.present) == self.state

    def fit(self, x: Tensor) -> bool:
        """Return whether x (..., width) can be multiplied."""
        strided = x.layout is torch.strided and not x.is_nested
        return strided and x.dtype == self.dtype and x.is_cpu and x.shape[-1:] == self.width

    def linear(self, x: Tensor) -> Tensor:
        """Map x (..., in) to (..., out) with the one weight and bias."""
        weight, bias = self.layouts
        return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, *NOTHING_FUSED)

    def feed_forward(self, x: Tensor, activation: str) -> Tensor:
        """Map x (..., D) to (..., O): the block without dropout, from up, down, gate and their biases."""
        up, down, gate, up_bias, down_bias, gate_bias = self.layouts
        matmul = torch.ops.mkldnn._linear_pointwise.default
        name = GATES.get(activation, activation)
        fused = FUSED.get(name)
        first, bias = (up, up_bias) if gate is None else (gate, gate_bias)
        h = matmul(x, first, bias, *(fused or NOTHING_FUSED))
        if fused is None:
            h = TABLE[name](h)
        if gate is not None:
            h.mul_(matmul(x, up, up_bias, *NOTHING_FUSED))  # 2% faster than fused into the matmul
        return matmul(h, down, down_bias, *NOTHING_FUSED)


_counted = attrgetter("_version", "dtype", "shape")


def _state(tensors: list[Tensor]) -> list:
    """Return all that shows a change of the tensors. Each call asks, so no Python line runs per tensor."""
    return [*map(_counted, tensors), *map(Tensor.data_ptr, tensors), *map(Tensor.stride, tensors)]
