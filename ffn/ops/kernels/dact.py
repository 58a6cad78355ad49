"""Backward of dropout, gate and activation in one pass: from dh to dpre, recomputing h.

h overwrites dh, which only backward holds. dpre may overwrite pre, and dgate may overwrite gate. The
gradients of the biases are sums over rows: each program sums its rows in float32, and torch then adds the
programs' sums in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ffn.ops import library
from ffn.ops.kernels.language import (
    check_offset,
    float32_nothing,
    formula,
    kept,
    rows_of,
    scale,
    threshold,
)

ROWS, COLS = 2, 512  # a tile
STRETCHES = 64, 32, 16, 8  # rows per program; fewer when there are few programs
PROGRAMS = 512  # enough to keep every SM of a large GPU reading


def stretch(N: int, H: int) -> int:
    """Return the most rows per program that still give at least PROGRAMS programs."""
    across = triton.cdiv(H, COLS)
    return next((rows for rows in STRETCHES if triton.cdiv(N, rows) * across >= PROGRAMS), STRETCHES[-1])


@triton.jit(do_not_specialize=["N", "row_start", "col_start", "least"])
def _dact(
    dh_ptr, pre_ptr, gate_ptr, dpre_ptr, dgate_ptr, sums_ptr, gate_sums_ptr, seed_ptr,
    N, H, dh_stride, pre_stride, gate_stride, row_start, col_start, least, factor,
    FORMULA: tl.constexpr, GATED: tl.constexpr, DROPOUT: tl.constexpr, KEEP_H: tl.constexpr,
    SUMS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, STRETCH: tl.constexpr,
):  # fmt: skip
    first, col = tl.program_id(0).to(tl.int64) * STRETCH, tl.program_id(1) * COLS
    cols = col + tl.arange(0, COLS)[None, :]
    dtype: tl.constexpr = dh_ptr.dtype.element_ty
    total, gate_total = tl.zeros([ROWS, COLS], tl.float32), tl.zeros([ROWS, COLS], tl.float32)
    for step in range(0, STRETCH, ROWS):
        row = first + step
        rows = row + tl.arange(0, ROWS)[:, None]
        inside = (rows < N) & (cols < H)
        x = tl.load(pre_ptr + rows * pre_stride + cols, inside, 0.0).to(tl.float32)
        dh = tl.load(dh_ptr + rows * dh_stride + cols, inside, 0.0).to(tl.float32)
        if DROPOUT:
            keep = kept(seed_ptr, row_start + row, col_start + col, least, ROWS, COLS)
            dh = tl.where(keep, dh * factor, 0.0)
        if GATED:
            gate = tl.load(gate_ptr + rows * gate_stride + cols, inside, 0.0).to(tl.float32)
            value, slope = FORMULA(gate)
            h, dpre, dgate = value * x, dh * value, dh * x * slope
            tl.store(dgate_ptr + rows * H + cols, dgate.to(dtype), inside)
            gate_total += dgate
        else:
            h, slope = FORMULA(x)
            dpre = dh * slope
        tl.store(dpre_ptr + rows * H + cols, dpre.to(dtype), inside)
        total += dpre
        if KEEP_H:
            if DROPOUT:
                h = tl.where(keep, h * factor, 0.0)
            tl.store(dh_ptr + rows * dh_stride + cols, h.to(dtype), inside)
    if SUMS:
        at = tl.program_id(0).to(tl.int64) * H + col + tl.arange(0, COLS)
        tl.store(sums_ptr + at, tl.sum(total, 0), col + tl.arange(0, COLS) < H)
        if GATED:
            tl.store(gate_sums_ptr + at, tl.sum(gate_total, 0), col + tl.arange(0, COLS) < H)


def dact_(
    dh, pre, gate, dpre, dgate, seed, activation: str, p: float, row_start: int, col_start: int,
    keep_h: bool, sums: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Write dpre and dgate (N, H), both contiguous. If `keep_h`, write h over dh.

    Returns:
        (dbias, dgate_bias), (H) in float32; both empty unless `sums`.
    """
    check_offset(col_start)
    pre, gate = rows_of(pre), rows_of(gate)
    assert dh.stride(1) == 1
    (N, H), gated = pre.shape, gate is not None
    rows = stretch(N, H)
    stretches = triton.cdiv(N, rows)
    parts = dpre.new_empty(1 + gated, stretches, H, dtype=torch.float32) if sums else None
    if dpre.numel() > 0:
        _dact[stretches, triton.cdiv(H, COLS)](
            dh, pre, gate, dpre, dgate,
            None if parts is None else parts[0], parts[1] if parts is not None and gated else None, seed,
            N, H, dh.stride(0), pre.stride(0), 0 if gate is None else gate.stride(0),
            row_start, col_start, threshold(p), scale(p), formula(activation),
            gated, seed is not None, keep_h, sums, ROWS, COLS, rows, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    if parts is None:
        return float32_nothing(dpre), float32_nothing(dpre)
    found = parts.sum(1)
    return found[0], found[1].clone() if gated else float32_nothing(dpre)


def _fake(dh, pre, gate, dpre, dgate, seed, activation, p, row_start, col_start, keep_h, sums):
    H = pre.shape[1]
    wide = pre.new_empty(H if sums else 0, dtype=torch.float32)
    return wide, pre.new_empty(H if sums and gate is not None else 0, dtype=torch.float32)


op = library.define(
    "dact_(Tensor(a!) dh, Tensor pre, Tensor? gate, Tensor(b!) dpre, Tensor(c!)? dgate, Tensor? seed, "
    "str activation, float p, SymInt row_start, SymInt col_start, bool keep_h, bool sums) "
    "-> (Tensor, Tensor)",
    dact_,
    fake=_fake,
)
