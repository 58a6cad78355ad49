"""Arguments of the elementwise kernels, embedded in larger buffers, and their expected results."""

from __future__ import annotations

from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from ffn.activations import TABLE
from ffn.ops.kernels import act, dact
from tests.ops.kernels.interpreted.oracle import DTYPES, F32, NAMES, Results, embedded, middle, noise, places

SEED = -(2**40) - 3


class Case(NamedTuple):
    """The arguments of `act` and `dact_`; None for absent ones."""

    name: str
    dh: Tensor
    pre: Tensor
    gate: Tensor | None
    seed: Tensor | None
    p: float
    row_start: int
    col_start: int

    def saved(self) -> list[Tensor]:
        return [t for t in (self.pre, self.gate, self.seed) if t is not None]

    def act(self) -> Tensor:
        _, _, *tensors, p, row_start, col_start = self
        return act.op(*tensors, self.name, p, row_start, col_start)

    def dact(self, dh: Tensor, keep_h: bool = True, sums: bool = True) -> list[Tensor]:
        """Return dpre, dgate and the biases' gradients; absent ones are empty."""
        _, _, pre, gate, seed, *numbers = self
        dpre, dgate = places(pre, gate)
        found = dact.op(dh, pre, gate, dpre, dgate, seed, self.name, *numbers, keep_h, sums)
        return [dpre, pre.new_empty(0) if dgate is None else dgate, *found]

    def noise(self) -> Tensor:
        return noise(self.seed, self.p, self.pre.shape, self.row_start, self.col_start)

    def textbook(self, dtype: torch.dtype) -> Results:
        """Return h and the gradients in dtype, from preactivations rounded to their storage type."""
        return middle(TABLE[self.name], self.dh, self.pre, self.gate, self.noise(), dtype)


def draw(
    name: str,
    shape: tuple[int, int],
    dtype: torch.dtype = F32,
    *,
    p: float = 0.3,
    seed: int = SEED,
    start: tuple[int, int] = (0, 0),
) -> Case:
    """Return a case with matrices that are views of larger buffers filled with NaN."""
    dh, pre, gate = (embedded(torch.randn(shape).to(dtype)) for _ in range(3))
    seeds = torch.tensor([seed]) if p > 0.0 else None
    return Case(name, dh, pre, gate if TABLE[name].gated else None, seeds, p, *start)


@st.composite
def cases(choose, most_rows: int) -> Case:
    torch.manual_seed(choose(st.integers(0, 2**31)))
    return draw(
        choose(st.sampled_from(NAMES)),
        (choose(st.integers(1, most_rows)), choose(st.integers(1, 70))),
        choose(st.sampled_from(DTYPES)),
        p=choose(st.sampled_from([0.0, 0.01, 0.5, 0.9])),
        seed=choose(st.integers(-(2**63), 2**63 - 1)),
        start=(choose(st.integers(0, 2**34)), 4 * choose(st.integers(0, 2**20))),
    )
