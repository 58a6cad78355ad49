"""Dropout's mask in torch ops: a function of (seed, row, column) alone, so that backward can recompute it.

One 32-bit word decides two neighbouring columns, 16 bits each. So p is applied to within 2**-17, and the
scale 1 / (1 - p) uses the applied p. A word is the sum of a row key and a column key (splitmix64 of the seed
and the index), passed through a multiply-xorshift mixer: eleven integer passes over half as many words as
elements. The rows are processed in blocks that stay in cache. On the CPU this is several times faster than
torch's generator. It needs no state, and a chunk of rows gets the same mask as within the whole tensor.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ffn.ops import library

_BLOCK = 1 << 17  # elements per block: its words fit a core's L2 cache
_LEVELS = 1 << 16


def draw_seed(device: torch.device) -> Tensor:
    """Draw a seed from the device's default torch generator: int64, shape (1,)."""
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)


def _threshold(p: float) -> int:
    return min(round(p * _LEVELS), _LEVELS - 1)


def scale(p: float) -> float:
    """Return the factor for kept elements: 1 / (1 - p) with the applied p."""
    return _LEVELS / (_LEVELS - _threshold(p))


def _splitmix(seed: Tensor, start: int, count: int, stream: int) -> Tensor:
    """Return the low 32 bits of splitmix64 (Steele, Lea, Flood 2014) of seed and index: int32, (count,)."""
    z = torch.arange(start, start + count, dtype=torch.int64, device=seed.device)
    z = (z * 2 + stream) * -7046029254386353131 + seed
    z = (z ^ (z >> 30)) * -4658895280553007687
    z = (z ^ (z >> 27)) * -7723592293110705685
    return (z ^ (z >> 31)).to(torch.int32)


# An opaque op: a compiler would otherwise recompute the 64-bit row and column keys for each element.
_keys = library.define(
    "dropout_keys(Tensor seed, SymInt start, SymInt count, int stream) -> Tensor",
    _splitmix,
    fake=lambda seed, start, count, stream: seed.new_empty(count, dtype=torch.int32),
)


def _mix_(w: Tensor) -> Tensor:
    """Multiply-xorshift with the lowbias32 constants, in place. Only the last shift must be logical."""
    w.bitwise_xor_(w >> 15).mul_(0x21F0AAAD)
    w.bitwise_xor_(w >> 15).mul_(0x735A2D97)
    return w.bitwise_xor_((w >> 16).bitwise_and_(0xFFFF))


def keep_blocks(
    seed: Tensor, rows: int, cols: int, p: float, row_start: int
) -> Iterator[tuple[slice, Tensor]]:
    """Yield (rows, keep) per block of rows; keep is int16, 1 for kept elements and 0 for dropped ones."""
    row_keys = _keys(seed, row_start, rows, 0)
    col_keys = _keys(seed, 0, (cols + 1) // 2, 1)
    step = max(1, _BLOCK // max(cols, 1)) if seed.device.type == "cpu" else max(rows, 1)
    for i in range(0, rows, step):
        bits = _mix_(row_keys[i : i + step, None] + col_keys).view(torch.int16)
        keep = torch.ge(bits, _threshold(p) - _LEVELS // 2, out=torch.empty_like(bits))  # bool is slower
        yield slice(i, min(i + step, rows)), keep[:, :cols]


def drop_(tensors: tuple[Tensor, ...], seed: Tensor, p: float, row_start: int = 0) -> None:
    """Drop the same elements of all tensors (rows, cols) of one dtype, in place, and scale the others."""
    rows, cols = tensors[0].shape
    half = tensors[0].dtype.itemsize == 2
    for block, keep in keep_blocks(seed, rows, cols, p, row_start):
        # Two-byte floats are masked bitwise, wider ones multiplied; each is the faster way on a CPU. Results
        # differ only for a dropped infinity: 0 for two-byte floats, NaN for wider ones as in torch's dropout.
        factor = keep.neg_() if half else keep.to(tensors[0].dtype).mul_(scale(p))
        for t in tensors:
            if half:
                t[block].view(torch.int16).bitwise_and_(factor)
                t[block].mul_(scale(p))
            else:
                t[block].mul_(factor)


def noise(seed: Tensor, rows: int, cols: int, p: float, dtype: torch.dtype, row_start: int = 0) -> Tensor:
    """Return the factors 0 or scale(p): (rows, cols)."""
    if torch.compiler.is_compiling():
        return _noise_in_one(seed, rows, cols, p, row_start).to(dtype)
    ones = torch.ones(rows, cols, dtype=dtype, device=seed.device)
    drop_((ones,), seed, p, row_start)
    return ones


def _noise_in_one(seed: Tensor, rows: int, cols: int, p: float, row_start: int) -> Tensor:
    """Return the same factors, computed without blocks, so that a compiler can fuse the ops."""
    words = _mix_(_keys(seed, row_start, rows, 0)[:, None] + _keys(seed, 0, (cols + 1) // 2, 1))
    halves = torch.stack([words << 16 >> 16, words >> 16], -1).view(rows, -1)[:, :cols]
    return torch.where(halves >= _threshold(p) - _LEVELS // 2, scale(p), 0.0)
