"""Functions that the kernels share: an activation's formula in Triton, dropout's mask, tiles.

The mask is Philox 4x32-10 (Salmon et al. 2011) keyed by the seed, at the counter (column // 4, row). One draw
decides four neighbouring columns, 31 bits each. Rows and columns count from the start of the whole tensor, so
a shard with the right offsets gets its part of the whole mask.
"""

from functools import cache
from types import FunctionType

import torch
import triton
import triton.language as tl
from torch import Tensor

from ffn.activations import TABLE

LEVELS = 1 << 31


def threshold(p: float) -> int:
    """Return the threshold for 31-bit draws: an element is dropped if its draw is below it."""
    return min(round(p * LEVELS), LEVELS - 1)


def scale(p: float) -> float:
    """Return the factor for kept elements: 1 / (1 - p) with the applied p."""
    return LEVELS / (LEVELS - threshold(p))


@cache
def formula(activation: str) -> triton.JITFunction:
    """Return the device function x -> (value, slope) of an activation; x is float32."""
    written = TABLE[activation].formula
    assert written is not None
    names = {"m": tl, "tl": tl, "__name__": written.__module__}
    return triton.jit(FunctionType(written.__code__, names, written.__name__))


@triton.jit
def kept(seed_ptr, row, col, threshold, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Return True for the elements of a tile (ROWS, COLS) at (row, col) that are kept; col % 4 must be 0."""
    rows = row + tl.arange(0, ROWS)[:, None].to(tl.int64)
    words = (col // 4 + tl.arange(0, COLS // 4))[None, :]
    zero = tl.zeros([ROWS, COLS // 4], tl.int32)
    low, high = rows.to(tl.int32) + zero, (rows >> 32).to(tl.int32) + zero
    a, b, c, d = tl.philox(tl.load(seed_ptr), words.to(tl.int32) + zero, low, high, zero)
    drawn = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [ROWS, COLS])  # a b c d a b c d ...
    return (drawn >> 1).to(tl.int32) >= threshold


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """Return x rounded to dtype, in float32: its value after being stored and read back."""
    return x.to(dtype).to(tl.float32)


def check_offset(col_start: int) -> None:
    """Raise ValueError unless col_start is a multiple of 4, the columns of one draw."""
    if col_start % 4:
        raise ValueError(f"col_start must be a multiple of 4, the columns of one draw, got {col_start}")


def rows_of(x: Tensor | None):
    """Return x (N, width) or (width), copied if its last dimension is strided; None stays None."""
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def nothing(x: Tensor) -> Tensor:
    """Return an empty tensor: an op's result that was not requested."""
    return x.new_empty(0)


def float32_nothing(x: Tensor) -> Tensor:
    """Return `nothing` in float32."""
    return x.new_empty(0, dtype=torch.float32)


@triton.jit
def tile_of(program, N, H, ROWS: tl.constexpr, COLS: tl.constexpr, GROUP: tl.constexpr):
    """Return (tile row, tile column) of a program: GROUP tile rows at a time, for cache reuse."""
    tile_rows, tile_cols = tl.cdiv(N, ROWS), tl.cdiv(H, COLS)
    group = program // (GROUP * tile_cols)
    first = group * GROUP
    height = min(tile_rows - first, GROUP)
    within = program % (GROUP * tile_cols)
    return first + within % height, within // height


@triton.jit
def _halved(x):
    return tl.split(tl.permute(tl.reshape(x, [x.shape[0], 2, x.shape[1] // 2]), [0, 2, 1]))


@triton.jit
def pieces(x, PARTS: tl.constexpr):
    """Split x (ROWS, COLS) into PARTS (1, 2, 4, ...) blocks of columns, so that fewer registers are live."""
    if PARTS == 1:
        parts = (x,)
    else:
        left, right = _halved(x)
        parts = pieces(left, PARTS // 2) + pieces(right, PARTS // 2)
    return parts
