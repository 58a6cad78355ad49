"""The fused first product and pass against float64, and against the unfused ones."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck
from torch.nn import functional as F

import ffn.ops.kernels.act
import ffn.ops.kernels.linear_act  # noqa: F401  (registers the ops)
from ffn.activations import TABLE
from tests.ops.kernels.interpreted.cases import SEED
from tests.ops.kernels.interpreted.oracle import (
    DTYPES,
    F32,
    F64,
    NAMES,
    bits,
    check,
    embedded,
    guarded,
    middle,
    noise,
    whole,
)  # fmt: skip

TILING = [16, 64, 16, 2, 1, 4, 2]  # rows, cols, depth, group, parts, warps, stages
names = pytest.mark.parametrize("name", NAMES)


class Case(NamedTuple):
    """The arguments of `linear_act`; None for absent ones."""

    x: Tensor
    up: Tensor
    gate_w: Tensor | None
    bias: Tensor | None
    gate_bias: Tensor | None
    seed: Tensor | None
    name: str
    p: float
    row_start: int
    col_start: int

    def run(self, keep_pre: bool = True, tiling: list[int] = TILING) -> list[Tensor]:
        return list(torch.ops.ffn.linear_act(*self, keep_pre, tiling))

    def products(self, dtype: torch.dtype) -> list[Tensor | None]:
        """Return [pre, gate] computed in dtype; gate is None when plain."""
        x = self.x.to(dtype)

        def product(weight: Tensor, bias: Tensor | None) -> Tensor:
            return F.linear(x, weight.to(dtype), None if bias is None else bias.to(dtype))

        return [
            product(self.up, self.bias),
            None if self.gate_w is None else product(self.gate_w, self.gate_bias),
        ]

    def noise(self) -> Tensor:
        shape = self.x.shape[0], self.up.shape[0]
        return noise(self.seed, self.p, shape, self.row_start, self.col_start)

    def h(self, pre: Tensor, gate: Tensor | None, dtype: torch.dtype) -> Tensor:
        return middle(TABLE[self.name], torch.zeros_like(pre), pre, gate, self.noise(), dtype).h


def draw(
    name: str,
    sizes: tuple[int, int, int] = (19, 40, 72),
    dtype: torch.dtype = F32,
    *,
    bias: bool = True,
    p: float = 0.3,
    seed: int = SEED,
    start: tuple[int, int] = (0, 0),
) -> Case:
    """Return a case of sizes (N, D, H) with matrices that are views of larger buffers filled with NaN."""
    (N, D, H), gated = sizes, TABLE[name].gated
    x = embedded(torch.randn(N, D).to(dtype))
    up, gate_w = (embedded((torch.randn(H, D) / D**0.5).to(dtype)) for _ in range(2))
    offset, gate_offset = (torch.randn(H).to(dtype) if bias else None for _ in range(2))
    return Case(
        x, up, gate_w if gated else None, offset, gate_offset if gated else None,
        torch.tensor([seed]) if p > 0.0 else None, name, p, *start,
    )  # fmt: skip


def check_case(case: Case, tiling: list[int] = TILING, ulps: int = 4) -> None:
    tensors = [t for t in case if isinstance(t, Tensor)]
    before = [bits(whole(t)).clone() for t in tensors]
    h, *pres = case.run(True, tiling)
    for field, ours, exact, plain in zip(
        ("pre", "gate"), pres, case.products(F64), case.products(F32), strict=True
    ):
        assert ours.dtype == case.x.dtype
        if exact is None:
            assert ours.numel() == 0
        else:
            check(field, ours, exact, plain, ulps)
    pre, gate = pres[0], None if case.gate_w is None else pres[1]
    check("h", h, case.h(pre, gate, F64), case.h(pre, gate, F32), ulps)
    assert all(torch.equal(bits(whole(t)), b) for t, b in zip(tensors, before, strict=True))


@names
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_act_equals_the_formula(name: str, dtype: torch.dtype) -> None:
    for bias in (True, False):
        for p in (0.0, 0.3):
            check_case(draw(name, dtype=dtype, bias=bias, p=p), [32, 64, 32, 2, 1, 4, 2])


@names
def test_optional_results(name: str) -> None:
    case = draw(name, (5, 8, 40))
    h, *nothing = case.run(keep_pre=False)
    assert torch.equal(bits(h), bits(case.run()[0]))
    assert all(t.numel() == 0 for t in nothing)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["gelu", "swiglu"])
def test_parts_do_not_change_results(name: str, dtype: torch.dtype) -> None:
    case = draw(name, dtype=dtype)
    whole_tiles = case.run()
    for parts in (2, 4):
        pieces = case.run(tiling=[16, 64, 16, 2, parts, 4, 2])
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(pieces, whole_tiles, strict=True))


@given(
    tokens=st.integers(1, 40),
    widths=st.tuples(st.integers(1, 6), st.integers(1, 10)),
    dtype=st.sampled_from(DTYPES),
    name=st.sampled_from(NAMES),
    bias=st.booleans(),
    p=st.sampled_from([0.0, 0.01, 0.9]),
    seed=st.integers(-(2**63), 2**63 - 1),
    tiling=st.tuples(*map(st.sampled_from, ([16, 32], [32, 64], [16, 32], [1, 2, 8], [1, 2, 4]))),
)
@settings(max_examples=12)
def test_linear_act_equals_the_formula_anywhere(tokens, widths, dtype, name, bias, p, seed, tiling) -> None:
    torch.manual_seed(seed % 2**32)
    case = draw(name, (tokens, 8 * widths[0], 8 * widths[1]), dtype, bias=bias, p=p, seed=seed)
    check_case(case, [*tiling, 4, 2], ulps=16)


@pytest.mark.parametrize("sizes", [(1, 8, 8), (16, 16, 64), (1, 48, 136), (0, 40, 72), (33, 8, 16)], ids=str)
@pytest.mark.parametrize("name", ["gelu", "swiglu"])
def test_any_sizes(name: str, sizes: tuple[int, int, int]) -> None:
    check_case(draw(name, sizes))


@pytest.mark.parametrize("name", ["gelu", "swiglu", "relu2"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fused_is_as_exact_as_unfused(name: str, dtype: torch.dtype) -> None:
    for bias in (True, False):
        case = draw(name, dtype=dtype, bias=bias)
        pre, gate = case.products(dtype)
        apart = torch.ops.ffn.act(pre, gate, case.seed, name, case.p, 0, 0)
        exact = case.h(*case.products(F64), F64)
        fused, unfused = ((h.double() - exact).abs().max() for h in (case.run()[0], apart))
        assert fused <= 2.0 * unfused + torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("name", ["gelu", "swiglu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_h_equals_the_pass_over_pre(name: str, dtype: torch.dtype) -> None:
    case = draw(name, dtype=dtype, start=(2**33 + 1, 2**20))
    h, pre, gate = case.run()
    rest = case.seed, name, case.p, case.row_start, case.col_start
    apart = torch.ops.ffn.act(pre, gate if TABLE[name].gated else None, *rest)
    assert torch.equal(bits(h), bits(apart))


@pytest.mark.parametrize("start", [(0, 0), (2**31 - 9, 0), (2**33 + 1, 2**30)], ids=str)
def test_shard_has_its_part_of_the_whole_mask(start: tuple[int, int]) -> None:
    case = draw("swiglu", (20, 16, 96), p=0.5, start=start)
    expected = case.run()
    rows, cols = slice(3, 20), slice(40, 96)
    shard = case._replace(
        x=case.x[rows], up=case.up[cols], gate_w=case.gate_w[cols], bias=case.bias[cols],
        gate_bias=case.gate_bias[cols], row_start=start[0] + rows.start, col_start=start[1] + cols.start,
    )  # fmt: skip
    check_case(case)
    for ours, full in zip(shard.run(), expected, strict=True):
        torch.testing.assert_close(ours, full[rows, cols], rtol=1e-5, atol=1e-6)
        assert torch.equal(ours == 0.0, full[rows, cols] == 0.0)


@pytest.mark.parametrize("name", ["gelu", "geglu"])
def test_single_bias(name: str) -> None:
    case = draw(name)
    check_case(case._replace(bias=None))
    check_case(case._replace(gate_bias=None))


@pytest.mark.parametrize("name", ["relu", "geglu"])
def test_no_write_outside_the_results(monkeypatch, name: str) -> None:
    case = draw(name, (19, 24, 40))
    for keep_pre in (True, False):
        with guarded(monkeypatch):
            case.run(keep_pre)


@names
def test_opcheck(name: str) -> None:
    for rows in (3, 0):
        for bias, p, keep_pre in ((True, 0.3, True), (False, 0.0, False)):
            arguments = (*draw(name, (rows, 8, 16), bias=bias, p=p), keep_pre, [16, 16, 16, 1, 1, 4, 2])
            opcheck(torch.ops.ffn.linear_act.default, arguments)
