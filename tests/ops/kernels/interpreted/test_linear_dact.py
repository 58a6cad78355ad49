"""The fused product dh = dy down and backward pass against float64, and against the unfused ones."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

import ffn.ops.kernels.act
import ffn.ops.kernels.dact
import ffn.ops.kernels.linear_act
import ffn.ops.kernels.linear_dact  # noqa: F401  (registers the ops)
from ffn.activations import TABLE
from tests.ops.kernels.interpreted.cases import SEED
from tests.ops.kernels.interpreted.oracle import (
    DTYPES,
    F32,
    F64,
    NAMES,
    Results,
    bits,
    check,
    embedded,
    factors,
    guarded,
    middle,
    noise,
    places,
    whole,
)  # fmt: skip

TILING = [16, 64, 16, 2, 1, 4, 2]  # rows, cols, depth, group, parts, warps, stages
names = pytest.mark.parametrize("name", NAMES)


class Case(NamedTuple):
    """The arguments of `linear_dact`, dy (N, O) and down (O, H); None for absent ones."""

    dy: Tensor
    down: Tensor
    pre: Tensor
    gate: Tensor | None
    seed: Tensor | None
    name: str
    p: float
    row_start: int
    col_start: int

    def run(self, keep_h: bool = True, sums: bool = True, tiling: list[int] = TILING) -> Results:
        dy, down, pre, gate, *rest = self
        dpre, dgate = places(pre, gate)
        h, *sums_found = torch.ops.ffn.linear_dact(
            dy, down, pre, gate, dpre, dgate, *rest, keep_h, sums, tiling
        )
        return Results(h, dpre, pre.new_empty(0) if dgate is None else dgate, *sums_found)

    def textbook(self, dtype: torch.dtype) -> Results:
        dropped = noise(self.seed, self.p, self.pre.shape, self.row_start, self.col_start)
        dh = self.dy.to(dtype) @ self.down.to(dtype)
        return middle(TABLE[self.name], dh, self.pre, self.gate, dropped, dtype)

    def apart(self) -> Results:
        """Return the same results unfused, with dh stored between product and pass."""
        h, rest = self.dy @ self.down, (self.name, self.p, self.row_start, self.col_start)
        dpre, dgate = places(self.pre, self.gate)
        found = torch.ops.ffn.dact_(h, self.pre, self.gate, dpre, dgate, self.seed, *rest, True, True)
        return Results(h, dpre, self.pre.new_empty(0) if dgate is None else dgate, *found)


def draw(
    name: str,
    sizes: tuple[int, int, int] = (19, 24, 72),
    dtype: torch.dtype = F32,
    *,
    p: float = 0.3,
    seed: int = SEED,
    start: tuple[int, int] = (0, 0),
) -> Case:
    """Return a case of sizes (N, O, H) with matrices that are views of larger buffers filled with NaN."""
    N, out, H = sizes
    dy, down = embedded(torch.randn(N, out).to(dtype)), embedded((torch.randn(out, H) / out**0.5).to(dtype))
    pre, gate = (embedded(torch.randn(N, H).to(dtype)) for _ in range(2))
    seeds = torch.tensor([seed]) if p > 0.0 else None
    return Case(dy, down, pre, gate if TABLE[name].gated else None, seeds, name, p, *start)


def check_case(case: Case, tiling: list[int] = TILING, ulps: int = 4) -> None:
    tensors = [t for t in case if isinstance(t, Tensor)]
    before = [bits(whole(t)).clone() for t in tensors]
    results, exact, plain = case.run(tiling=tiling), case.textbook(F64), case.textbook(F32)
    for field, ours, oracle, theirs in zip(Results._fields, results, exact, plain, strict=True):
        assert ours.dtype == (F32 if "bias" in field else case.dy.dtype)
        if oracle is None:
            assert ours.numel() == 0
        else:
            check(field, ours, oracle, theirs, ulps)
    assert all(torch.equal(bits(whole(t)), b) for t, b in zip(tensors, before, strict=True))


@names
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_dact_equals_the_formula(name: str, dtype: torch.dtype) -> None:
    for p in (0.0, 0.3):
        check_case(draw(name, dtype=dtype, p=p))


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
    p=st.sampled_from([0.0, 0.01, 0.9]),
    seed=st.integers(-(2**63), 2**63 - 1),
    tiling=st.tuples(*map(st.sampled_from, ([16, 32], [32, 64], [16, 32], [1, 2, 8], [1, 2, 4]))),
)
@settings(max_examples=12)
def test_linear_dact_equals_the_formula_anywhere(tokens, widths, dtype, name, p, seed, tiling) -> None:
    torch.manual_seed(seed % 2**32)
    case = draw(name, (tokens, 8 * widths[0], 8 * widths[1]), dtype, p=p, seed=seed)
    check_case(case, [*tiling, 4, 2], ulps=16)


@pytest.mark.parametrize("sizes", [(1, 8, 8), (16, 16, 64), (1, 48, 136), (0, 40, 72), (33, 8, 16)], ids=str)
@pytest.mark.parametrize("name", ["gelu", "swiglu"])
def test_any_sizes(name: str, sizes: tuple[int, int, int]) -> None:
    check_case(draw(name, sizes))


@pytest.mark.parametrize("name", ["gelu", "swiglu", "relu2"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fused_is_as_exact_as_unfused(name: str, dtype: torch.dtype) -> None:
    case = draw(name, dtype=dtype)
    fused, apart, exact = case.run(), case.apart(), case.textbook(F64)
    assert torch.equal(bits(fused.h), bits(apart.h))
    for ours, theirs, oracle in zip(fused, apart, exact, strict=True):
        if oracle is not None:
            error, allowed = ((t.double() - oracle).abs().max() for t in (ours, theirs))
            assert error <= 2.0 * allowed + torch.finfo(dtype).eps * oracle.abs().max()


@names
def test_h_equals_forwards_h(name: str) -> None:
    for dtype in DTYPES:
        x, up = torch.randn(19, 16).to(dtype), torch.randn(72, 16).to(dtype) / 4
        case = draw(name, dtype=dtype, start=(2**33 + 1, 2**20))
        gate_w = None if case.gate is None else up.flip(0)
        rest = case.seed, name, case.p, case.row_start, case.col_start
        h, pre, gate = torch.ops.ffn.linear_act(x, up, gate_w, None, None, *rest, True, TILING)
        back = case._replace(pre=pre, gate=None if case.gate is None else gate)
        assert torch.equal(bits(back.run().h), bits(h))


@names
def test_optional_results(name: str) -> None:
    case = draw(name, (5, 8, 40))
    everything = case.run()
    for keep_h in (True, False):
        for sums in (True, False):
            found = case.run(keep_h, sums)
            assert torch.equal(found.h, everything.h if keep_h else everything.h.flatten()[:0])
            assert torch.equal(bits(found.dpre), bits(everything.dpre))
            assert torch.equal(bits(found.dgate), bits(everything.dgate))
            for ours, full in zip(found[3:], everything[3:], strict=True):
                assert torch.equal(ours, full if sums else full[:0])


def test_packed_gate_and_up() -> None:
    for dtype in DTYPES:
        gate, up = embedded(torch.randn(19, 2 * 72).to(dtype)).chunk(2, dim=1)
        check_case(draw("swiglu", dtype=dtype)._replace(pre=up, gate=gate))
        check_case(draw("geglu", dtype=dtype)._replace(pre=gate, gate=up))


@pytest.mark.parametrize("start", [(0, 0), (2**31 - 9, 0), (2**33 + 1, 2**30)], ids=str)
def test_shard_has_its_part_of_the_whole_mask(start: tuple[int, int]) -> None:
    case = draw("swiglu", (20, 16, 96), p=0.5, start=start)
    check_case(case)
    rows, cols = slice(3, 20), slice(40, 96)
    shard = case._replace(
        dy=case.dy[rows], down=case.down[:, cols], pre=case.pre[rows, cols], gate=case.gate[rows, cols],
        row_start=start[0] + rows.start, col_start=start[1] + cols.start,
    )  # fmt: skip
    for ours, full in zip(shard.run()[:3], case.run()[:3], strict=True):
        torch.testing.assert_close(ours, full[rows, cols], rtol=1e-5, atol=1e-6)
        assert torch.equal(ours == 0.0, full[rows, cols] == 0.0)


def test_dropped_infinities_become_zero() -> None:
    case = draw("identity", p=0.5)
    case.pre.fill_(float("-inf"))
    case.dy.fill_(float("inf"))
    case.down.fill_(1.0)
    h, dpre = case.run(sums=False)[:2]
    kept = factors(int(case.seed), case.p, *case.pre.shape) != 0.0
    for found, extreme in ((h, float("-inf")), (dpre, float("inf"))):
        assert torch.equal(bits(found), bits(torch.where(kept, extreme, 0.0)))


@pytest.mark.parametrize("name", ["relu", "geglu"])
def test_no_write_outside_the_results(monkeypatch, name: str) -> None:
    case = draw(name, (19, 24, 40))
    with guarded(monkeypatch):
        case.run()


@names
def test_opcheck(name: str) -> None:
    for rows in (3, 0):
        for p, asked in ((0.3, True), (0.0, False)):
            dy, down, pre, gate, *rest = draw(name, (rows, 8, 16), p=p)
            given = dy, down, pre, gate, *places(pre, gate), *rest
            opcheck(torch.ops.ffn.linear_dact.default, (*given, asked, asked, [16, 16, 16, 1, 1, 4, 2]))


@pytest.mark.parametrize("tiling", [TILING, [16, 64, 16, 2, 4, 4, 2]], ids=["whole", "in_parts"])
@names
def test_gradients_may_overwrite_preactivations(name: str, tiling: list[int]) -> None:
    case = draw(name, p=0.3)
    want = case.run(tiling=tiling)
    dy, down, pre, gate, *rest = case
    h, *_ = torch.ops.ffn.linear_dact(dy, down, pre, gate, pre, gate, *rest, True, True, tiling)
    for found, exact in zip((h, pre, gate), want, strict=False):
        assert found is None or torch.equal(bits(found), bits(exact))
