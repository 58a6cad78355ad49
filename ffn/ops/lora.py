"""A product with a LoRA adapter: a factor pair of low rank beside the weight.

    z  = x W^T + bias + scale drop(x) A^T B^T
    u  = dz B      dA = scale u^T drop(x)      dB = scale dz^T (drop(x) A^T)      dx = dz W + scale drop(u A)

Backward needs x alone. Neither W + scale B A nor, for a frozen weight, its gradient is ever formed.

Source: Hu et al. 2021.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ffn.ops import matmul
from ffn.ops.dense import Dense
from ffn.ops.dropout import dropped, noise
from ffn.ops.dropout_mask import draw_seed


class LoRA(NamedTuple):
    """z = x weight^T + bias + scale drop(x) a^T b^T, with weight (out, in), a (r, in) and b (out, r).

    seed (1,) int64 of the dropout with probability p, or None without. row_start: row of the dropout mask
    of the first token.
    """

    weight: Tensor
    bias: Tensor | None
    a: Tensor
    b: Tensor
    seed: Tensor | None
    scale: float
    p: float = 0.0
    row_start: int = 0

    TENSORS = 5

    def __call__(self, x: Tensor) -> Tensor:
        """z (..., out) of x (..., in), by differentiable torch ops."""
        y = F.linear(x, self.weight, self.bias)
        if self.seed is not None:
            tokens, width = x.shape
            x = x * noise(self.seed, tokens, width, self.p, x.dtype, self.row_start)
        elif self.p:
            x = F.dropout(x, self.p)
        return y + self.scale * F.linear(F.linear(x, self.a.to(x.dtype)), self.b.to(x.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """z (N, out) of x (N, in)."""
        y = matmul.linear(x, self.weight, self.bias)
        return y.addmm_(self._dropped(x) @ self.a.t(), self.b.t(), alpha=self.scale)

    def input_gradient(self, dz: Tensor, out: Tensor | None = None, add: bool = False) -> Tensor:
        """dx (N, in) of dz (N, out), written over `out` or added to it."""
        dx = matmul.product(dz, self.weight, out=out, add=add)
        if self.seed is None:
            return dx.addmm_(dz @ self.b, self.a, alpha=self.scale)
        return dx.add_(self._dropped(dz @ self.b @ self.a), alpha=self.scale)

    def gradients(
        self, dz: Tensor, x: Tensor | None, needs: Sequence[bool], dbias: Tensor | None = None
    ) -> list[Tensor | None]:
        """(dweight, dbias, da, db, None) of dz (N, out) and x (N, in), None where not needed."""
        base = Dense(self.weight, self.bias).gradients(dz, x, needs[:2], dbias)
        need_a, need_b = needs[2:4]
        da = db = None
        if need_a or need_b:
            assert x is not None
            x = self._dropped(x)
            da = torch.mm((dz @ self.b).t(), x).mul_(self.scale) if need_a else None
            db = torch.mm(dz.t(), x @ self.a.t()).mul_(self.scale) if need_b else None
        return [*base, da, db, None]

    def autocast(self, dtype: torch.dtype) -> "LoRA":
        """The product as autocast wants it: the rule casts, and keeps no copies."""
        return self

    def with_seed(self) -> "LoRA":
        """The product with a seed drawn for its dropout."""
        return self._replace(seed=draw_seed(self.a.device)) if self.p else self

    def at(self, row_start: int) -> "LoRA":
        """The product for tokens that begin at this row of the dropout mask."""
        return self._replace(row_start=row_start)

    def _dropped(self, x: Tensor) -> Tensor:
        return x if self.seed is None else dropped(x, self.seed, self.p, self.row_start)
