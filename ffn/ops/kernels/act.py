"""Activation, gate and dropout fused into one pass over the preactivations.

h = drop(act(pre)) when plain, drop(act(gate) * pre) when gated.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ffn.ops import library
from ffn.ops.kernels.language import check_offset, formula, kept, rows_of, scale, threshold

ROWS, COLS = 2, 1024


@triton.jit(do_not_specialize=["N", "row_start", "col_start", "least"])
def _act(
    pre_ptr, gate_ptr, h_ptr, seed_ptr,
    N, H, pre_stride, gate_stride, row_start, col_start, least, factor,
    FORMULA: tl.constexpr, GATED: tl.constexpr, DROPOUT: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    program, across = tl.program_id(0), tl.cdiv(H, COLS)
    row, col = (program // across).to(tl.int64) * ROWS, program % across * COLS
    rows, cols = row + tl.arange(0, ROWS)[:, None], col + tl.arange(0, COLS)[None, :]
    inside = (rows < N) & (cols < H)
    x = tl.load(pre_ptr + rows * pre_stride + cols, inside, 0.0).to(tl.float32)
    if GATED:
        gate = tl.load(gate_ptr + rows * gate_stride + cols, inside, 0.0).to(tl.float32)
        value, _ = FORMULA(gate)
        h = value * x
    else:
        h, _ = FORMULA(x)
    if DROPOUT:
        keep = kept(seed_ptr, row_start + row, col_start + col, least, ROWS, COLS)
        h = tl.where(keep, h * factor, 0.0)
    tl.store(h_ptr + rows * H + cols, h.to(h_ptr.dtype.element_ty), inside)


def act(pre, gate, seed, activation: str, p: float, row_start: int, col_start: int) -> Tensor:
    """Return h (N, H) for pre and gate (N, H).

    row_start, col_start: the mask's row and column for the first element of pre.
    """
    check_offset(col_start)
    pre, gate = rows_of(pre), rows_of(gate)
    (N, H), dtype = pre.shape, pre.dtype
    h = torch.empty(N, H, dtype=dtype, device=pre.device)
    grid = (triton.cdiv(N, ROWS) * triton.cdiv(H, COLS),)  # one axis, since the others are limited to 65535
    if h.numel() == 0:
        return h
    _act[grid](
        pre, gate, h, seed,
        N, H, pre.stride(0), 0 if gate is None else gate.stride(0), row_start, col_start,
        threshold(p), scale(p), formula(activation),
        gate is not None, seed is not None, ROWS, COLS, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return h


op = library.define(
    "act(Tensor pre, Tensor? gate, Tensor? seed, str activation, float p, SymInt row_start, "
    "SymInt col_start) -> Tensor",
    act,
    fake=lambda pre, *_: pre.new_empty(pre.shape),
)
