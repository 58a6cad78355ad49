"""A product of the block: a weight and a bias, forward and back.

The rule (`ffn.ops.rule`) runs over products. A product is a NamedTuple of TENSORS tensors, weight and bias
first, then constants, with the methods of `Dense`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ffn.ops import matmul


class Dense(NamedTuple):
    """z = x weight^T + bias, with weight (out, in) and bias (out) or None."""

    weight: Tensor
    bias: Tensor | None = None

    TENSORS = 2

    def __call__(self, x: Tensor) -> Tensor:
        """z (..., out) of x (..., in), by differentiable torch ops."""
        return F.linear(x, self.weight, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """z (N, out) of x (N, in)."""
        return matmul.linear(x, self.weight, self.bias)

    def input_gradient(self, dz: Tensor, out: Tensor | None = None, add: bool = False) -> Tensor:
        """dx (N, in) of dz (N, out), written over `out` or added to it."""
        return matmul.product(dz, self.weight, out=out, add=add)

    def gradients(
        self, dz: Tensor, x: Tensor | None, needs: Sequence[bool], dbias: Tensor | None = None
    ) -> list[Tensor | None]:
        """(dweight, dbias) of dz (N, out) and x (N, in), None where not needed.

        x may be None if the weight needs no gradient. dbias: the column sums of dz, if they are known.
        """
        need_weight, need_bias = needs
        dweight = None
        if need_weight:
            assert x is not None
            dweight = matmul.weight_gradient(dz, x, self.weight)
        if need_bias and dbias is None:
            dbias = dz.sum(0)
        return [dweight, dbias if need_bias else None]

    def autocast(self, dtype: torch.dtype) -> "Dense":
        """The product as autocast wants it: a frozen weight is cast by the rule, which keeps no copy."""
        weight, bias = (t if t is None or not t.requires_grad else t.to(dtype) for t in self)
        return Dense(weight, bias)  # pyright: ignore[reportArgumentType]

    def with_seed(self) -> "Dense":
        """The product with seeds drawn for its dropouts: it has none."""
        return self

    def at(self, row_start: int) -> "Dense":
        """The product for tokens that begin at this row of the dropout mask."""
        return self
