"""What the kernels share on the device: an activation's formula as Triton reads it, and dropout's mask.

The mask is Philox 4x32-10 (Salmon et al. 2011) keyed by the seed, at the counter (column // 4, row): one draw
decides four neighbouring columns, by 31 bits each. Rows and columns count from the whole's first, so a shard
that knows its offsets drops what the whole drops.
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
    """The draws of 31 bits below which an element is dropped."""
    return min(round(p * LEVELS), LEVELS - 1)


def scale(p: float) -> float:
    """What kept elements are multiplied with."""
    return LEVELS / (LEVELS - threshold(p))


@cache
def formula(activation: str) -> triton.JITFunction:
    """The device function x -> (value, slope) of a row of the table; x is float32."""
    written = TABLE[activation].formula
    assert written is not None
    names = {"m": tl, "tl": tl, "__name__": written.__module__}
    return triton.jit(FunctionType(written.__code__, names, written.__name__))


@triton.jit
def kept(seed_ptr, row, col, threshold, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Which elements of a tile (ROWS, COLS) at (row, col) dropout keeps; col is a multiple of 4."""
    rows = row + tl.arange(0, ROWS)[:, None].to(tl.int64)
    words = (col // 4 + tl.arange(0, COLS // 4))[None, :]
    zero = tl.zeros([ROWS, COLS // 4], tl.int32)
    low, high = rows.to(tl.int32) + zero, (rows >> 32).to(tl.int32) + zero
    a, b, c, d = tl.philox(tl.load(seed_ptr), words.to(tl.int32) + zero, low, high, zero)
    drawn = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [ROWS, COLS])  # a b c d a b c d ...
    return (drawn >> 1).to(tl.int32) >= threshold


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """x as it would be read back from memory: rounded to dtype, in float32."""
    return x.to(dtype).to(tl.float32)


def check_offset(col_start: int) -> None:
    """Raise ValueError for a column within a draw."""
    if col_start % 4:
        raise ValueError(f"col_start={col_start}: want a multiple of 4, the columns of one draw")


def rows_of(x: Tensor | None):
    """x (N, width) or (width) with neighbours side by side, as the kernels read it; None stays None."""
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def nothing(x: Tensor) -> Tensor:
    """Stands for an absent tensor among an op's results."""
    return x.new_empty(0)


def float32_nothing(x: Tensor) -> Tensor:
    return x.new_empty(0, dtype=torch.float32)


@triton.jit
def tile_of(program, N, H, ROWS: tl.constexpr, COLS: tl.constexpr, GROUP: tl.constexpr):
    """(tile row, tile column) of a program: GROUP tile rows at a time, column by column, to stay in cache."""
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
    """x (ROWS, COLS) as PARTS (1, 2, 4, ...) blocks of neighbouring columns: fewer registers live at once."""
    if PARTS == 1:
        parts = (x,)
    else:
        left, right = _halved(x)
        parts = pieces(left, PARTS // 2) + pieces(right, PARTS // 2)
    return parts
