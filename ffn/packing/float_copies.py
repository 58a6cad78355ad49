"""Products on the CPU from weights in oneDNN's own layout, and the block made of such products.

A few tokens are bound by reading the weights, which the usual routines do at half the speed of the memory;
and with the weight laid out once, the activation runs within the product. A copy doubles the weight's memory
for as long as it is kept. Its sums run in longer chains: in float32 their rounding error is some 2.5 times
that of F.linear.
"""

from ctypes import Array, c_char, sizeof
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor

from ffn.activations import GATES, TABLE
from ffn.ops import hardware

_TOKENS = 512  # the layout for so many serves one token best, too
_PROBE = 64  # bytes at either end

# What oneDNN does to a product before writing it, by its names. Its relu would turn NaN into 0.
AS_IT_IS = "none", [], ""
WITHIN = {"silu": ("swish", [], ""), "gelu": ("gelu", [], "none"), "gelu_tanh": ("gelu", [], "tanh"),
          "sigmoid": ("sigmoid", [], ""), "tanh": ("tanh", [], ""), "identity": AS_IT_IS}  # fmt: skip


def refusal(tensor: Tensor, taker: str, able: bool) -> str | None:
    """Why `taker` cannot take this weight or bias, where oneDNN is able to or not; None if it can."""
    kind = f"{str(tensor.dtype)[6:]} on {tensor.device.type}"
    if tensor.device.type != "cpu" or tensor.dtype not in (torch.float32, torch.bfloat16):
        return f"{kind}; {taker} float32 and bfloat16 on the CPU"
    if not able:
        return f"{kind}, which oneDNN does not take on this processor or in this build of torch"
    if tensor.is_inference():
        return "made in inference mode, where writes go uncounted; make it outside"
    return None if tensor.is_contiguous() else "strided; make it contiguous"  # oneDNN misreads a strided bias


class Packed:
    """Copies of weights that are used together, and what tells that one of them has changed since.

    Args:
        tensors: weights (out, in) and then their biases (out), None among both; each as `why_not` wants it.
            Biases are not copied.
        joined: whether to make one weight and one bias of them all, for one product; copies the biases too.

    `layouts` holds the copies in their places, `dtype` and `width` what an x (..., width) must have,
    `heights` the widths of what comes out.
    """

    what = "products in oneDNN, from copies of the weights in its own layout"

    def __init__(self, tensors: tuple[Tensor | None, ...], joined: bool = False):
        given = [t for t in tensors if t is not None]
        self.tensors = tensors
        self.aliases = [t.detach() for t in given]  # so that no address is given to another
        self.given, self.seen = given, _glance(given)
        self.ends = [end for t in given if joined or t.ndim == 2 for end in _ends(t)]
        self.bytes = [end.raw for end in self.ends]
        self.dtype, self.width = given[0].dtype, given[0].shape[1:]
        self.heights = [t.shape[0] for t in given if t.ndim == 2]
        if joined:
            weights, biases = ([t for t in self.aliases if t.ndim == ndim] for ndim in (2, 1))
            tensors = torch.cat(weights), torch.cat(biases) if biases else None
        plain = [None if t is None else t.detach() for t in tensors]
        weights, biases = plain[: len(plain) // 2], plain[len(plain) // 2 :]
        copies = [None if w is None else self.copy(w, b) for w, b in zip(weights, biases, strict=True)]
        self.layouts: list[Any] = [*copies, *biases]

    @staticmethod
    def why_not(tensor: Tensor) -> str | None:
        """Why oneDNN cannot lay out this weight (out, in) by itself, or take this bias; None if it can."""
        return refusal(tensor, "oneDNN packs", hardware.packs(tensor.dtype))

    @staticmethod
    def copy(weight: Tensor, bias: Tensor | None) -> Any:
        """The copy of a weight (out, in), whose product that bias (out) will be added to."""
        return torch.ops.mkldnn._reorder_linear_weight.default(weight, _TOKENS)

    def are_of(self, tensors: tuple[Tensor | None, ...]) -> bool:
        """Whether these are the copies of these tensors as they are now, as far as a glance can tell.

        It sees another tensor, memory, shape, strides or dtype, every write that torch counts, and any change
        of the first or last 64 bytes of what was copied. It does not see a write past the counter (through
        `weight.data`, numpy or another process) that leaves both ends as they are.
        """
        if not all(map(is_, tensors, self.tensors)) or _glance(self.given) != self.seen:
            return False
        return [end.raw for end in self.ends] == self.bytes  # memory that is still there: its address holds

    def fit(self, x: Tensor) -> bool:
        """Whether x (..., width) can be multiplied."""
        strided = x.layout is torch.strided and not x.is_nested
        return strided and x.dtype == self.dtype and x.is_cpu and x.shape[-1:] == self.width

    def linear(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out), for a weight and a bias."""
        weight, bias = self.layouts
        return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, *AS_IT_IS)

    def feed_forward(self, x: Tensor, activation: str) -> Tensor:
        """The block without dropout, (..., D) -> (..., O), for up, down, gate and their biases."""
        up, down, gate, up_bias, down_bias, gate_bias = self.layouts
        product = torch.ops.mkldnn._linear_pointwise.default
        name = GATES.get(activation, activation)
        within = WITHIN.get(name)
        first, bias = (up, up_bias) if gate is None else (gate, gate_bias)
        h = product(x, first, bias, *(within or AS_IT_IS))
        if within is None:
            h = TABLE[name](h)
        if gate is not None:
            h.mul_(product(x, up, up_bias, *AS_IT_IS))  # 2% faster than within the product
        return product(h, down, down_bias, *AS_IT_IS)


_facts = attrgetter("_version", "dtype", "shape")


def _glance(tensors: list[Tensor]) -> list:
    """What tells whether they have changed; asked at each call, so no line of Python runs for a tensor."""
    return [*map(_facts, tensors), *map(Tensor.data_ptr, tensors), *map(Tensor.stride, tensors)]


def _ends(weight: Tensor) -> tuple[Array, Array]:
    """Views of the first and the last bytes."""
    start, size = weight.data_ptr(), weight.nbytes
    view = c_char * min(_PROBE, size)
    return view.from_address(start), view.from_address(start + size - sizeof(view))
