"""A product of the block: matmul with a weight, plus a bias, with its gradients.

The rule (`ffn.ops.rule`) computes with products. A product is a NamedTuple with the methods of `Dense`. Its
first TENSORS fields are tensors or None, beginning with weight and bias; constants follow.
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
        """Return z (..., out) for x (..., in), with differentiable torch ops."""
        return F.linear(x, self.weight, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return z (N, out) for x (N, in), outside autograd."""
        return matmul.linear(x, self.weight, self.bias)

    def input_gradient(self, dz: Tensor, out: Tensor | None = None, add: bool = False) -> Tensor:
        """Return dx (N, in) for dz (N, out): written to `out` if given, or added to it if `add`."""
        return matmul.product(dz, self.weight, out=out, add=add)

    def needs_input(self, needs: Sequence[bool]) -> bool:
        """True if `gradients` reads x for what is needed: the weight's gradient does, the bias's does not."""
        return needs[0]

    def gradients(
        self, dz: Tensor, x: Tensor | None, needs: Sequence[bool], dbias: Tensor | None = None
    ) -> list[Tensor | None]:
        """Return (dweight, dbias) for dz (N, out) and x (N, in), None where not needed.

        x may be None if the weight needs no gradient. dbias: the column sums of dz, if already computed.
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
        """Cast the tensors that need gradients. The rule casts frozen ones, and saves no copy of them."""
        frozen = torch.is_grad_enabled()  # else nothing is kept, and all are cast here
        weight, bias = (t if t is None or (frozen and not t.requires_grad) else t.to(dtype) for t in self)
        return Dense(weight, bias)  # pyright: ignore[reportArgumentType]

    def with_seed(self) -> "Dense":
        """Return the product with a seed drawn for its dropout; Dense has none."""
        return self

    def at(self, row_start: int) -> "Dense":
        """Return the product for a chunk of tokens that starts at this row of the dropout mask."""
        return self
