"""The elementwise backward against the formula in float64, bitwise equal h, and unchanged inputs."""

import pytest
import torch
from hypothesis import given, settings
from torch.library import opcheck

from ffn.ops.kernels import dact
from tests.ops.kernels.interpreted.cases import Case, cases, draw
from tests.ops.kernels.interpreted.oracle import (
    DTYPES,
    F32,
    F64,
    NAMES,
    Results,
    bits,
    check,
    embedded,
    guarded,
    places,
    whole,
)  # fmt: skip

names = pytest.mark.parametrize("name", NAMES)
SHAPES = [(7, 70), (1, 1), (3, 1030), (67, 8), (0, 70), (5, 0)]


@pytest.fixture(scope="module", autouse=True)
def _small_tiles():
    """Use small tiles: several per tensor with edges, at sizes the interpreter can run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dact, "ROWS", 4)
        patch.setattr(dact, "COLS", 64)
        patch.setattr(dact, "STRETCHES", (8,))
        yield


def check_case(case: Case, ulps: int = 4) -> None:
    before = [bits(whole(t)).clone() for t in case.saved()]
    around = bits(whole(case.dh)).clone()
    dh = case.dh.clone()
    exact, plain, h = case.textbook(F64), case.textbook(F32), case.act()
    dpre, dgate, dbias, dgate_bias = case.dact(case.dh)
    results = Results(case.dh, dpre, dgate, dbias, dgate_bias)
    assert torch.equal(bits(case.dh), bits(h)), "recomputed h differs from forward's"
    for field, ours, oracle, theirs in zip(Results._fields, results, exact, plain, strict=True):
        assert ours.dtype == (F32 if "bias" in field else dh.dtype)
        if oracle is None:
            assert ours.numel() == 0
        else:
            check(field, ours, oracle, theirs, ulps)
    assert all(torch.equal(bits(whole(t)), b) for t, b in zip(case.saved(), before, strict=True))
    case.dh.copy_(dh)
    assert torch.equal(bits(whole(case.dh)), around), "the kernel wrote outside dh"


@names
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dact_equals_the_formula(name: str, dtype: torch.dtype) -> None:
    for p in (0.0, 0.3):
        check_case(draw(name, (7, 70), dtype, p=p))


@given(cases(most_rows=19))
@settings(max_examples=20)
def test_dact_equals_the_formula_anywhere(case: Case) -> None:
    check_case(case, ulps=16)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ["gelu", "swiglu"])
def test_any_shape_in_the_default_tiles(monkeypatch, name: str, shape: tuple[int, int]) -> None:
    for size, value in {"ROWS": 2, "COLS": 512, "STRETCHES": (64, 32, 16, 8)}.items():
        monkeypatch.setattr(dact, size, value)
    check_case(draw(name, shape, p=0.0 if shape[0] * shape[1] > 500 else 0.3))


@pytest.mark.parametrize("H", [1, 768, 3072, 14336])
def test_rows_per_program(monkeypatch: pytest.MonkeyPatch, H: int) -> None:
    monkeypatch.setattr(dact, "COLS", 512)
    monkeypatch.setattr(dact, "STRETCHES", (64, 32, 16, 8))
    for N in (1, 128, 1000, 8192, 2**20):
        rows = dact.stretch(N, H)
        programs = {size: -(-N // size) * -(-H // 512) for size in (8, 16, 32, 64, 128)}
        assert rows == 8 or programs[rows] >= dact.PROGRAMS
        assert rows == 64 or programs[2 * rows] < dact.PROGRAMS


@pytest.mark.parametrize("name", ["relu", "geglu"])
def test_no_write_outside_the_results(monkeypatch, name: str) -> None:
    for shape in ((11, 70), (8, 64), (1, 1)):
        case = draw(name, shape)
        with guarded(monkeypatch):
            case.dact(case.dh)


@names
def test_optional_results(name: str) -> None:
    case = draw(name, (5, 70))
    dh = case.dh.clone()
    everything = case.dact(dh)
    for keep_h in (True, False):
        for sums in (True, False):
            buffer = bits(whole(case.dh)).clone()
            given_dh = embedded(case.dh)
            found = case.dact(given_dh, keep_h, sums)
            assert torch.equal(bits(given_dh), bits(dh if keep_h else case.dh))
            assert torch.equal(bits(whole(case.dh)), buffer)
            for ours, full in zip(found[:2], everything[:2], strict=True):
                assert torch.equal(bits(ours), bits(full))
            for ours, full in zip(found[2:], everything[2:], strict=True):
                assert torch.equal(ours, full if sums else full[:0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_gate_and_up(dtype: torch.dtype) -> None:
    gate, up = embedded(torch.randn(5, 2 * 24).to(dtype)).chunk(2, dim=1)
    case = draw("swiglu", (5, 24), dtype)._replace(pre=up, gate=gate)
    check_case(case)
    check_case(case._replace(dh=case.dh.clone(), pre=gate, gate=up))


def test_strided_columns() -> None:
    pre, gate = torch.randn(70, 7).t(), torch.randn(7, 140)[:, ::2]
    check_case(draw("geglu", (7, 70))._replace(pre=pre, gate=gate))
    check_case(draw("silu", (7, 70))._replace(pre=gate))


def test_sums_over_many_rows_are_exact() -> None:
    for dtype in DTYPES:
        check_case(draw("reglu", (70, 4), dtype, p=0.0))


@pytest.mark.parametrize("start", [(0, 0), (2**31 - 3, 0), (2**33 + 1, 2**30)], ids=str)
def test_shard_has_its_part_of_the_whole_mask(start: tuple[int, int]) -> None:
    case = draw("gelu", (9, 96), p=0.5, start=start)
    full, part = case.dh.clone(), case.dh[3:, 20:].clone()
    dpre = case.dact(full)[0]
    shard = case._replace(pre=case.pre[3:, 20:], row_start=start[0] + 3, col_start=start[1] + 20)
    assert torch.equal(bits(shard.dact(part)[0]), bits(dpre[3:, 20:]))
    assert torch.equal(bits(part), bits(full[3:, 20:]))


def test_dropped_infinities_become_zero() -> None:
    case = draw("swiglu", (4, 64), p=0.5)
    case.pre.fill_(float("-inf"))
    h = case.act()
    case.dact(case.dh)
    assert torch.equal(case.dh.isnan(), h.isnan())
    assert torch.equal(bits(case.dh), bits(h))


@names
def test_opcheck(name: str) -> None:
    for rows in (3, 0):
        for p, asked in ((0.3, True), (0.0, False)):
            _, dh, pre, gate, seed, p, row, col = draw(name, (rows, 20), p=p)
            arguments = dh, pre, gate, *places(pre, gate), seed, name, p, row, col, asked, asked
            opcheck(dact.op, arguments)
    schema = torch.ops.ffn.dact_.default._schema
    written = [a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write]
    assert written == ["dh", "dpre", "dgate"]


@names
def test_gradients_may_overwrite_preactivations(name: str) -> None:
    case = draw(name, (9, 72))
    case = case._replace(
        pre=case.pre.contiguous(), gate=None if case.gate is None else case.gate.contiguous()
    )
    want, (_, dh, pre, gate, seed, *numbers) = case.dact(case.dh.clone()), case
    dact.op(dh, pre, gate, pre, gate, seed, name, *numbers, True, True)
    for found, exact in zip((pre, gate), want, strict=False):
        assert found is None or torch.equal(bits(found), bits(exact))
