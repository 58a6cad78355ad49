"""Functions that kernels share: dropout's Philox mask, formulas, tiles and pieces."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from ffn.activations import TABLE
from ffn.ops.kernels import language
from tests.ops.kernels.interpreted.oracle import DTYPES, F32, NAMES, draws, philox
from tests.ops.masks import PROBABILITIES, check_counts

SEEDS = [0, 1, -1, -3, 2**32, 2**63 - 1, -(2**63), 0x0123456789ABCDEF]
STARTS = [(0, 0), (5, 8), (2**31 - 3, 4), (2**31, 12), (2**32 - 2, 0), (2**33 + 7, 2**20)]


@triton.jit
def _kept(out_ptr, seed_ptr, row, col, least, ROWS: tl.constexpr, COLS: tl.constexpr):
    at = tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :]
    tl.store(out_ptr + at, language.kept(seed_ptr, row, col, least, ROWS, COLS))


def kept(seed: int, least: int, rows: int, cols: int, row: int = 0, col: int = 0) -> np.ndarray:
    out = torch.empty(rows, cols, dtype=torch.bool)
    _kept[1,](out, torch.tensor([seed]), row, col, least, rows, cols)
    return out.numpy()


def test_oracle_philox_gives_known_answers() -> None:
    """From Random123's kat_vectors: zeros, ones, and the digits of pi."""
    known = [
        ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ]
    for counter, key, answer in known:
        words = philox(np.array(counter, np.uint32), (key[0], key[1]))
        assert " ".join(f"{word:08x}" for word in words) == answer


def test_first_four_columns_are_the_known_answer() -> None:
    for column, word in enumerate([0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]):
        assert kept(0, word >> 1, 1, 4)[0, column]
        assert not kept(0, (word >> 1) + 1, 1, 4)[0, column]


@pytest.mark.parametrize("seed", SEEDS)
def test_mask_is_philox(seed: int) -> None:
    for row, col in STARTS:
        drawn = draws(seed, 4, 32, row, col) >> 1
        for least in (0, 1 << 29, int(drawn[3, 30]), int(drawn[1, 5]) + 1, 2**31 - 1):
            assert np.array_equal(kept(seed, least, 4, 32, row, col), drawn >= least)


@pytest.mark.parametrize("p", PROBABILITIES)
def test_kept_share_and_independent_neighbours(p: float) -> None:
    mask = torch.from_numpy(~kept(12345, language.threshold(p), 256, 256))
    check_counts(mask.sum(), mask.numel(), p)
    check_counts(mask.sum(0), 256, p)
    check_counts(mask.sum(1), 256, p)
    for m in (mask, mask.t()):
        for distance in (1, 2, 3, 4, 64):
            a, b = m[: 256 - 256 % (2 * distance)].unflatten(0, (-1, 2, distance)).unbind(1)
            check_counts((a == b).sum(), a.numel(), p**2 + (1.0 - p) ** 2)
            check_counts((a & b).sum(), a.numel(), p**2)
        check_counts((m[1:-1:2] & m[2::2]).sum(), m[2::2].numel(), p**2)


@pytest.mark.parametrize("p", [0.0, 1e-12, 1e-3, 0.1, 0.5, 0.9, 1.0 - 1e-12])
def test_scale_is_one_over_the_kept_share(p: float) -> None:
    share = 1.0 - language.threshold(p) / 2**31
    assert 0.0 < share <= 1.0
    assert abs(share - (1.0 - p)) <= 2.0**-31
    assert language.scale(p) == 1.0 / share


@triton.jit
def _formula(x_ptr, value_ptr, slope_ptr, FORMULA: tl.constexpr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    value, slope = FORMULA(tl.load(x_ptr + at))
    tl.store(value_ptr + at, value)
    tl.store(slope_ptr + at, slope)


@pytest.mark.parametrize("name", NAMES)
def test_formula_equals_the_table_in_float32(name: str) -> None:
    inf = float("inf")
    special = torch.tensor([0.0, -0.0, 1e-40, -1e-40, 20.0, -20.0, 100.0, -100.0, inf, -inf, float("nan")])
    x = torch.cat([special, torch.linspace(-30.0, 30.0, 1000), torch.randn(1037)])
    ours = torch.empty_like(x), torch.empty_like(x)
    _formula[1,](x, *ours, language.formula(name), x.numel())
    torchs, exact = TABLE[name].formula(x), TABLE[name].formula(x.double())
    for got, plain, oracle in zip(ours, torchs, exact, strict=True):
        assert got.dtype == F32
        torch.testing.assert_close(got, plain, rtol=1e-5, atol=1e-6, equal_nan=True)
        finite = oracle.isfinite()
        error, allowed = ((y.double() - oracle)[finite].abs() for y in (got, plain))
        assert error.max() <= 2.0 * allowed.max() + torch.finfo(F32).eps * oracle[finite].abs().max()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounded_equals_a_round_trip_through_memory(dtype: torch.dtype) -> None:
    x, y = torch.randn(1024), torch.empty(1024)
    _rounded[1,](x, y, torch.empty(1, dtype=dtype), 1024)
    assert torch.equal(y, x.to(dtype).float())


@triton.jit
def _rounded(x_ptr, y_ptr, like_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(y_ptr + at, language.rounded(tl.load(x_ptr + at), like_ptr.dtype.element_ty))


@triton.jit
def _tiles(out_ptr, N, H, ROWS: tl.constexpr, COLS: tl.constexpr, GROUP: tl.constexpr):
    program = tl.program_id(0)
    row, col = language.tile_of(program, N, H, ROWS, COLS, GROUP)
    tl.store(out_ptr + 2 * program, row)
    tl.store(out_ptr + 2 * program + 1, col)


@pytest.mark.parametrize(("N", "H"), [(1, 1), (70, 33), (64, 64), (200, 10), (10, 200)])
@pytest.mark.parametrize("group", [1, 2, 8])
def test_tiles_are_covered_once_in_grouped_order(N: int, H: int, group: int) -> None:
    high, wide = -(-N // 16), -(-H // 32)
    out = torch.empty(high * wide, 2, dtype=torch.int32)
    _tiles[high * wide,](out, N, H, 16, 32, group)
    found = [(int(row), int(col)) for row, col in out]
    bands = [range(first, min(first + group, high)) for first in range(0, high, group)]
    assert found == [(row, col) for band in bands for col in range(wide) for row in band]


@triton.jit
def _pieces(x_ptr, y_ptr, ROWS: tl.constexpr, COLS: tl.constexpr, PARTS: tl.constexpr):
    rows, cols = tl.arange(0, ROWS)[:, None], tl.arange(0, COLS)[None, :]
    parts = language.pieces(tl.load(x_ptr + rows * COLS + cols), PARTS)
    WIDTH: tl.constexpr = COLS // PARTS
    at = rows * COLS + tl.arange(0, WIDTH)[None, :]
    for part in tl.static_range(PARTS):
        tl.store(y_ptr + at + part * WIDTH, parts[part])


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_pieces_are_consecutive_columns(parts: int) -> None:
    x = torch.randn(8, 32)
    y = torch.empty_like(x)
    _pieces[1,](x, y, 8, 32, parts)
    assert torch.equal(x, y)


def test_rows_of_copies_only_strided_columns() -> None:
    x = torch.randn(6, 8)
    for view in (x, x[:, 2:6], x[::2]):
        assert language.rows_of(view) is view
    apart: Tensor = x.t()
    assert torch.equal(language.rows_of(apart), apart)
    assert language.rows_of(apart).stride(1) == 1
