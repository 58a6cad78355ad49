"""Oracles for the kernels: Philox in NumPy, the formula in torch, and the allowed error.

Kernels round preactivations to their storage type and compute the rest in float32. So the exact answer is
the formula in float64 from rounded preactivations. The allowed error is twice that of the formula in float32,
plus a few ulps of float32 for another order of operations, plus half an ulp of the storage type for storing
the result. For half precision that is far less than twice plain torch's error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from ffn.activations import TABLE, Activation

NAMES = list(TABLE)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
F32, F64 = torch.float32, torch.float64


def philox(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Return Philox 4x32-10 (Salmon et al. 2011) of counters (..., 4): four uint32 words each."""
    c = [counter[..., i].astype(np.uint64) for i in range(4)]
    low, word = np.uint64(0xFFFFFFFF), np.uint64(32)
    for turn in range(10):
        k = [np.uint64((half + turn * step) % 2**32) for half, step in zip(key, KEY_STEPS, strict=True)]
        first, second = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [second >> word ^ c[1] ^ k[0], second & low, first >> word ^ c[3] ^ k[1], first & low]
    return np.stack(c, -1).astype(np.uint32)


KEY_STEPS = 0x9E3779B9, 0xBB67AE85


def draws(seed: int, rows: int, cols: int, row_start: int = 0, col_start: int = 0) -> np.ndarray:
    """Return the 32-bit draw of each element: (rows, cols), uint32; col_start is a multiple of 4."""
    row = np.arange(row_start, row_start + rows, dtype=np.int64).view(np.uint64)[:, None]
    column = np.arange(col_start // 4, (col_start + cols + 3) // 4, dtype=np.uint64)[None, :]
    low = np.uint64(0xFFFFFFFF)
    counter = np.stack(np.broadcast_arrays(column & low, row & low, row >> np.uint64(32), row * 0), -1)
    words = philox(counter, (seed % 2**32, (seed >> 32) % 2**32))
    return words.reshape(rows, 4 * column.size)[:, :cols]


def level(p: float) -> int:
    """Return the smallest kept value of a draw's upper 31 bits."""
    return min(round(p * 2**31), 2**31 - 1)


def factors(seed: int, p: float, rows: int, cols: int, row_start: int = 0, col_start: int = 0) -> Tensor:
    """Return dropout's factors, 0 or one over the kept share: (rows, cols), float32."""
    kept = draws(seed, rows, cols, row_start, col_start) >> 1 >= level(p)
    return torch.from_numpy(kept).float() * (2**31 / (2**31 - level(p)))


def noise(seed: Tensor | None, p: float, shape: Sequence[int], row_start: int, col_start: int) -> Tensor:
    """Return `factors` of a shape; ones if seed is None."""
    if seed is None:
        return torch.ones(*shape)
    rows, cols = shape
    return factors(int(seed), p, rows, cols, row_start, col_start)


class Results(NamedTuple):
    """h and the gradients of the preactivations and biases; gate fields are None when plain."""

    h: Tensor
    dpre: Tensor
    dgate: Tensor | None
    dbias: Tensor
    dgate_bias: Tensor | None


def middle(
    row: Activation, dh: Tensor, pre: Tensor, gate: Tensor | None, noise: Tensor, dtype: torch.dtype
) -> Results:
    """Return h from the preactivations, and the gradients from dh, by the activation's formula in dtype."""
    pre, dh, noise = pre.to(dtype), dh.to(dtype) * noise.to(dtype), noise.to(dtype)
    if gate is None:
        h, slope = row.formula(pre)
        dpre, dgate = dh * slope, None
    else:
        value, slope = row.formula(gate.to(dtype))
        h, dpre, dgate = value * pre, dh * value, dh * pre * slope
    return Results(h * noise, dpre, dgate, dpre.sum(0), None if dgate is None else dgate.sum(0))


def check(name: str, ours: Tensor, exact: Tensor, plain: Tensor, ulps: int = 4) -> None:
    """Assert an allowed error. exact, plain: results in float64 and float32, from inputs of order one."""
    assert ours.shape == exact.shape, name
    if exact.numel() == 0:
        return
    largest = max(1.0, exact.abs().max().item())
    allowed = 2.0 * (plain.double() - exact).abs().max().item() + ulps * torch.finfo(F32).eps * largest
    info = torch.finfo(ours.dtype)
    storing = 0.0 if ours.dtype == F32 else 0.5 * info.eps * exact.abs().clamp_min(info.tiny)
    worst = ((ours.double() - exact).abs() - storing).max().item()
    assert worst <= allowed, f"{name}: error {worst:.2e} besides storing, allowed {allowed:.2e}"


def places(*preactivations: Tensor | None) -> list[Tensor | None]:
    """Return empty tensors for the gradients of preactivations."""
    return [None if t is None else torch.empty(t.shape, dtype=t.dtype) for t in preactivations]


def bits(x: Tensor) -> Tensor:
    """Return x's bits as integers, so that zeros and NaNs compare bitwise."""
    return x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.dtype.itemsize])


def embedded(x: Tensor, side: int = 8, filling: float = float("nan")) -> Tensor:
    """Return x (N, H) as a view of a larger buffer; kernels must not write the rest, or depend on it."""
    N, H = x.shape
    buffer = x.new_full((N + 2, H + 2 * side), filling)
    view = buffer[1 : 1 + N, side : side + H]
    return view.copy_(x)


def whole(view: Tensor) -> Tensor:
    """Return the flat buffer that contains a view."""
    return view.as_strided((view.untyped_storage().nbytes() // view.dtype.itemsize,), (1,), 0)


@contextmanager
def guarded(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Surround each tensor that torch allocates with canaries, and assert that they are unchanged at exit.

    The interpreter does not check bounds: a kernel can write beyond the end of a tensor.
    """
    made = []

    def within(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*args, **options) -> Tensor:
            x = allocate(*args, **options)
            if x.numel() == 0:
                return x
            edge = 64
            buffer = x.new_full((edge + x.numel() + edge,), 77.0)
            made.append((buffer, edge, edge + x.numel()))
            return buffer[edge:-edge].view(x.shape)

        return run

    with patch.context() as inside:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
            inside.setattr(owner, name, within(getattr(owner, name)))
        yield
    assert made, "no watched function allocated a tensor"
    for buffer, start, end in made:
        assert (buffer[:start] == 77.0).all(), "a kernel wrote before a tensor"
        assert (buffer[end:] == 77.0).all(), "a kernel wrote after a tensor"
