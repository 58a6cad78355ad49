"""Random arguments for `feed_forward`, and the gradients of a call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ffn.activations import TABLE, Activation
from ffn.ops import reference
from ffn.ops.dense import Dense

F64 = torch.float64
NAMES = list(TABLE)
SAVES = [{"save": "preact"}, {"save": "input"}, {"save": "input", "chunk_tokens": 3}]


class Arguments(NamedTuple):
    """The tensors of `feed_forward(*arguments, activation=...)`; None for absent ones."""

    x: Tensor
    up: Tensor
    down: Tensor
    gate: Tensor | None
    up_bias: Tensor | None
    down_bias: Tensor | None
    gate_bias: Tensor | None

    def products(self) -> tuple[Dense, Dense, Dense | None]:
        """Return (up, down, gate); gate is None when plain."""
        gate = None if self.gate is None else Dense(self.gate, self.gate_bias)
        return Dense(self.up, self.up_bias), Dense(self.down, self.down_bias), gate

    def given(self) -> list[Tensor]:
        return [t for t in self if t is not None]

    def to(self, dtype: torch.dtype) -> Arguments:
        """Return copies in another dtype, as leaves that require gradients."""
        return Arguments(*(None if t is None else leaf(t.detach().to(dtype, copy=True)) for t in self))


def by_reference(*arguments: Tensor | None, activation: Activation, noise: Tensor | None = None) -> Tensor:
    """Return the reference formula's y for the fields of `Arguments`."""
    given = Arguments(*arguments)
    return reference.feed_forward(given.x, *given.products(), activation=activation, noise=noise)


def leaf(t: Tensor) -> Tensor:
    return t.requires_grad_()


def draw(
    activation: str,
    *,
    bias: bool = True,
    shape: Sequence[int] = (7,),
    widths: tuple[int, int, int] = (6, 10, 5),
    dtype: torch.dtype = F64,
) -> Arguments:
    """Return random leaves: x (*shape, D) and weights that preserve variance. widths: (D, H, O)."""
    D, H, out = widths
    gated = TABLE[activation].gated

    def weight(rows: int, cols: int) -> Tensor:
        return leaf(torch.randn(rows, cols, dtype=dtype) / cols**0.5)

    def offset(width: int) -> Tensor | None:
        return leaf(torch.randn(width, dtype=dtype)) if bias else None

    x = leaf(torch.randn(*shape, D, dtype=dtype))
    return Arguments(
        x, weight(H, D), weight(out, H), weight(H, D) if gated else None,
        offset(H), offset(out), offset(H) if gated else None,
    )  # fmt: skip


def gradients(y: Tensor, arguments: Arguments, dy: Tensor) -> list[Tensor]:
    """Return the gradient for each given argument, where dy is the gradient of y."""
    return list(torch.autograd.grad(y, arguments.given(), dy))
