"""The elementwise forward against the formula in float64, with unchanged inputs."""

import pytest
import torch
from hypothesis import given, settings
from torch.library import opcheck

from ffn.activations import TABLE
from ffn.ops.kernels import act
from tests.ops.kernels.interpreted.cases import SEED, Case, cases, draw
from tests.ops.kernels.interpreted.oracle import (
    DTYPES,
    F32,
    F64,
    NAMES,
    bits,
    check,
    embedded,
    factors,
    guarded,
    whole,
)  # fmt: skip

names = pytest.mark.parametrize("name", NAMES)
SHAPES = [(7, 70), (1, 1), (3, 1030), (1, 64), (0, 70), (5, 0)]


@pytest.fixture(scope="module", autouse=True)
def _small_tiles():
    """Use small tiles: several per tensor with edges, at sizes the interpreter can run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(act, "ROWS", 8)
        patch.setattr(act, "COLS", 64)
        yield


def check_case(case: Case, ulps: int = 4) -> None:
    before = [bits(whole(t)).clone() for t in case.saved()]
    h = case.act()
    assert h.dtype == case.pre.dtype
    assert h.is_contiguous()
    check("h", h, case.textbook(F64).h, case.textbook(F32).h, ulps)
    assert all(torch.equal(bits(whole(t)), b) for t, b in zip(case.saved(), before, strict=True))


@names
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_act_equals_the_formula(name: str, dtype: torch.dtype) -> None:
    for p in (0.0, 0.3):
        check_case(draw(name, (7, 70), dtype, p=p))


@given(cases(most_rows=9))
@settings(max_examples=20)
def test_act_equals_the_formula_anywhere(case: Case) -> None:
    check_case(case, ulps=16)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ["gelu", "swiglu"])
def test_any_shape_in_the_default_tiles(monkeypatch, name: str, shape: tuple[int, int]) -> None:
    monkeypatch.setattr(act, "ROWS", 2)
    monkeypatch.setattr(act, "COLS", 1024)
    check_case(draw(name, shape))


def test_grid_limits_for_a_long_row(monkeypatch) -> None:
    class Launch:
        def __class_getitem__(cls, grid):
            grids.append(grid)
            return lambda *_, **__: None

    grids = []
    monkeypatch.setattr(act, "_act", Launch)
    monkeypatch.setattr(act, "COLS", 1024)
    act.act(torch.empty(1, 2**30 + 1, device="meta"), None, None, "identity", 0.0, 0, 0)
    ((along, *others),) = grids
    assert along < 2**31
    assert all(count <= 65535 for count in others)


@pytest.mark.parametrize("name", ["relu", "geglu"])
def test_no_write_outside_h(monkeypatch, name: str) -> None:
    for shape in ((7, 70), (4, 64), (1, 1)):
        case = draw(name, shape)
        with guarded(monkeypatch):
            case.act()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_gate_and_up(dtype: torch.dtype) -> None:
    packed = embedded(torch.randn(5, 2 * 24).to(dtype))
    gate, up = packed.chunk(2, dim=1)
    case = draw("swiglu", (5, 24), dtype)._replace(pre=up, gate=gate)
    check_case(case)
    check_case(case._replace(pre=gate, gate=up))


def test_strided_columns() -> None:
    pre, gate = torch.randn(70, 7).t(), torch.randn(7, 140)[:, ::2]
    check_case(draw("geglu", (7, 70))._replace(pre=pre, gate=gate))
    check_case(draw("geglu", (7, 70))._replace(pre=gate, gate=pre))
    check_case(draw("silu", (7, 70))._replace(pre=torch.randn(1, 70).expand(7, 70)))


@pytest.mark.parametrize("start", [(0, 0), (2**31 - 3, 0), (2**33 + 1, 2**30)], ids=str)
def test_shard_has_its_part_of_the_whole_mask(start: tuple[int, int]) -> None:
    whole_case = draw("swiglu", (9, 96), p=0.5, start=start)
    expected = whole_case.act()
    for rows, cols in ((slice(0, 4), slice(0, 48)), (slice(3, 9), slice(20, 96))):
        case = whole_case._replace(
            pre=whole_case.pre[rows, cols], gate=whole_case.gate[rows, cols],
            row_start=start[0] + rows.start, col_start=start[1] + cols.start,
        )  # fmt: skip
        assert torch.equal(bits(case.act()), bits(expected[rows, cols]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_factors_are_philox(dtype: torch.dtype) -> None:
    for p in (0.0, 1e-6, 0.25, 0.999):
        ones, seed = torch.ones(6, 70, dtype=dtype), torch.tensor([SEED])
        h = torch.ops.ffn.act(ones, None, seed, "identity", p, 11, 8)
        assert torch.equal(h, factors(SEED, p, 6, 70, 11, 8).to(dtype))


def test_dropped_infinities_become_zero() -> None:
    case = draw("identity", (4, 64), p=0.5)
    case.pre.fill_(float("-inf"))
    h, noise = case.act(), case.noise()
    assert torch.equal(bits(h[noise == 0.0]), torch.zeros(int((noise == 0.0).sum()), dtype=torch.int32))
    assert torch.isneginf(h[noise != 0.0]).all()


@names
def test_opcheck(name: str) -> None:
    for rows in (3, 0):
        for p in (0.3, 0.0):
            _, _, *tensors, p, row, col = draw(name, (rows, 20), p=p)
            opcheck(act.op, (*tensors, name, p, row, col))
    assert TABLE[name].gated == (tensors[1] is not None)
