"""A product with a LoRA adapter: a low-rank update A, B added to the weight's product.

    z  = x W^T + bias + scale drop(x) A^T B^T
    u  = dz B      dA = scale u^T drop(x)      dB = scale dz^T (drop(x) A^T)      dx = dz W + scale drop(u A)

Backward needs x alone. W + scale B A is never formed, nor is the gradient of a frozen weight.

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

    seed: (1,) int64 of the dropout with probability p, or None while not drawn or without dropout. row_start:
    the dropout mask's row for the first token.
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
        """Return z (..., out) for x (..., in), with differentiable torch ops."""
        y = F.linear(x, self.weight, self.bias)
        if self.seed is not None:
            tokens, width = x.shape
            x = x * noise(self.seed, tokens, width, self.p, x.dtype, self.row_start)
        elif self.p:
            x = F.dropout(x, self.p)
        return y + self.scale * F.linear(F.linear(x, self.a.to(x.dtype)), self.b.to(x.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Return z (N, out) for x (N, in), outside autograd."""
        y = matmul.linear(x, self.weight, self.bias)
        return y.addmm_(self._dropped(x) @ self.a.t(), self.b.t(), alpha=self.scale)

    def input_gradient(self, dz: Tensor, out: Tensor | None = None, add: bool = False) -> Tensor:
        """Return dx (N, in) for dz (N, out): written to `out` if given, or added to it if `add`."""
        dx = matmul.product(dz, self.weight, out=out, add=add)
        if self.seed is None:
            return dx.addmm_(dz @ self.b, self.a, alpha=self.scale)
        return dx.add_(self._dropped(dz @ self.b @ self.a), alpha=self.scale)

    def needs_input(self, needs: Sequence[bool]) -> bool:
        """True if `gradients` reads x for what is needed: for the weight's gradient and the factors'."""
        return needs[0] or needs[2] or needs[3]

    def gradients(
        self, dz: Tensor, x: Tensor | None, needs: Sequence[bool], dbias: Tensor | None = None
    ) -> list[Tensor | None]:
        """Return (dweight, dbias, da, db, None) for dz (N, out) and x (N, in), None where not needed."""
        base = Dense(self.weight, self.bias).gradients(dz, x, needs[:2], dbias)
        need_a, need_b = needs[2:4]
        da = db = None
        if need_a or need_b:
            assert x is not None
            x = self._dropped(x)
            da = torch.mm((dz @ self.b).t(), x).mul_(self.scale) if need_a else None
            db = torch.mm(dz.t(), x @ self.a.t()).mul_(self.scale) if need_b else None
        return [*base, da, db, None]

    def misfit(self) -> str | None:
        """Return what is wrong with the factors, or None."""
        out, width = self.weight.shape
        rank = self.a.shape[0] if isinstance(self.a, Tensor) and self.a.ndim == 2 else "rank"
        for name, t, shape in (("lora_A", self.a, (rank, width)), ("lora_B", self.b, (out, rank))):
            if not isinstance(t, Tensor) or t.shape != shape or t.device != self.weight.device:
                given = f"{tuple(t.shape)} on {t.device}" if isinstance(t, Tensor) else type(t).__name__
                wanted = f"({', '.join(map(str, shape))}) on {self.weight.device}"
                return f"{name} must be {wanted}, got {given}"
        return None

    def autocast(self, dtype: torch.dtype) -> "LoRA":
        """Return the product unchanged: the rule casts all its tensors, and saves no copies."""
        return self

    def with_seed(self) -> "LoRA":
        """Return the product with a seed drawn for its dropout."""
        return self._replace(seed=draw_seed(self.a.device)) if self.p else self

    def at(self, row_start: int) -> "LoRA":
        """Return the product for a chunk of tokens that starts at this row of the dropout mask."""
        return self._replace(row_start=row_start)

    def _dropped(self, x: Tensor) -> Tensor:
        return x if self.seed is None else dropped(x, self.seed, self.p, self.row_start)
