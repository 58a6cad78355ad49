"""The product dh = dy down fused with the backward of dropout, gate and activation, with h and bias sums.

dh is never stored: each tile of it becomes dpre (and dgate), and h is recomputed beside it. Each row of tiles
stores its float32 sums over rows; torch adds these in a fixed order for the gradients of the biases. dpre may
overwrite pre, and dgate may overwrite gate: each piece is read before it is written.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ffn.ops import library
from ffn.ops.kernels.language import (
    check_offset,
    float32_nothing,
    formula,
    kept,
    nothing,
    pieces,
    scale,
    threshold,
    tile_of,
)
from ffn.ops.kernels.tilings import Tiling


@triton.jit
def _finish(
    dh, row, col, pre_desc, gate_desc, h_desc, dpre_desc, dgate_desc, sums_ptr, gate_sums_ptr, seed_ptr, H,
    tile_row, row_start, col_start, least, factor,
    FORMULA: tl.constexpr, GATED: tl.constexpr, DROPOUT: tl.constexpr, KEEP_H: tl.constexpr,
    SUMS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Turn dh of a tile (ROWS, COLS) at (row, col) into dpre, dgate, h and sums, and store them."""
    dtype: tl.constexpr = dpre_desc.dtype
    cols = col + tl.arange(0, COLS)
    at = tile_row.to(tl.int64) * H + cols
    x = pre_desc.load([row, col]).to(tl.float32)
    if GATED:
        value, slope = FORMULA(gate_desc.load([row, col]).to(tl.float32))
        h = value * x
    else:
        h, slope = FORMULA(x)
    # Join and split give h the thread layout of dh. Otherwise the compiler computes h a second time in the
    # layout of its store.
    h, dh = tl.split(tl.join(h, dh))
    if DROPOUT:
        keep = kept(seed_ptr, row_start + row.to(tl.int64), col_start + col, least, ROWS, COLS)
        dh = tl.where(keep, dh * factor, 0.0)
        h = tl.where(keep, h * factor, 0.0)
    if KEEP_H:
        h_desc.store([row, col], h.to(dtype))
    if GATED:
        dpre, dgate = dh * value, dh * x * slope
        dgate_desc.store([row, col], dgate.to(dtype))
        if SUMS:
            tl.store(gate_sums_ptr + at, tl.sum(dgate, 0), cols < H)
    else:
        dpre = dh * slope
    dpre_desc.store([row, col], dpre.to(dtype))
    if SUMS:
        tl.store(sums_ptr + at, tl.sum(dpre, 0), cols < H)


@triton.jit(do_not_specialize=["N", "row_start", "col_start", "least"])
def _linear_dact(
    dy_desc, down_desc, pre_desc, gate_desc, h_desc, dpre_desc, dgate_desc, sums_ptr, gate_sums_ptr, seed_ptr,
    N, WIDTH_OUT, H, row_start, col_start, least, factor,
    FORMULA: tl.constexpr, GATED: tl.constexpr, DROPOUT: tl.constexpr, KEEP_H: tl.constexpr,
    SUMS: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    tile_row, tile_col = tile_of(tl.program_id(0), N, H, ROWS, COLS, GROUP)
    row, col = tile_row * ROWS, tile_col * COLS
    dh = tl.zeros([ROWS, COLS], tl.float32)
    for k in range(0, WIDTH_OUT, DEPTH):
        dh = tl.dot(dy_desc.load([row, k]), down_desc.load([k, col]), dh, input_precision="ieee")
    WIDTH: tl.constexpr = COLS // PARTS
    dhs = pieces(dh, PARTS)
    for part in tl.static_range(PARTS):
        _finish(
            dhs[part], row, col + part * WIDTH, pre_desc, gate_desc, h_desc, dpre_desc, dgate_desc,
            sums_ptr, gate_sums_ptr, seed_ptr, H, tile_row, row_start, col_start, least, factor,
            FORMULA, GATED, DROPOUT, KEEP_H, SUMS, ROWS, WIDTH,
        )  # fmt: skip


def linear_dact(
    dy, down, pre, gate, dpre, dgate, seed, activation: str, p: float, row_start: int, col_start: int,
    keep_h: bool, sums: bool, tiling: list[int],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Write dpre and dgate (N, H).

    Returns:
        (h, dbias, dgate_bias): h (N, H), empty unless `keep_h`; sums (H) in float32, empty unless `sums`.
    """
    check_offset(col_start)
    t = Tiling(*tiling)
    (N, width), H, gated = dy.shape, down.shape[1], gate is not None
    h = torch.empty_like(dpre) if keep_h else nothing(dpre)
    tile_rows = triton.cdiv(N, t.rows)
    parts = dpre.new_empty(1 + gated, tile_rows, H, dtype=torch.float32) if sums else None
    if dpre.numel() > 0:
        outer = [t.rows, t.cols // t.parts]
        describe = TensorDescriptor.from_tensor
        _linear_dact[(tile_rows * triton.cdiv(H, t.cols),)](
            describe(dy, [t.rows, t.depth]), describe(down, [t.depth, t.cols]), describe(pre, outer),
            describe(gate, outer) if gated else None, describe(h, outer) if keep_h else None,
            describe(dpre, outer), describe(dgate, outer) if gated else None,
            None if parts is None else parts[0], parts[1] if parts is not None and gated else None, seed,
            N, width, H, row_start, col_start, threshold(p), scale(p), formula(activation),
            gated, seed is not None, keep_h, sums, t.rows, t.cols, t.depth, t.group, t.parts,
            num_warps=t.warps, num_stages=t.stages, enable_fp_fusion=True,
        )  # fmt: skip
    if parts is None:
        return h, float32_nothing(dpre), float32_nothing(dpre)
    found = parts.sum(1)
    return h, found[0], found[1].clone() if gated else float32_nothing(dpre)


def _fake(
    dy, down, pre, gate, dpre, dgate, seed, activation, p, row_start, col_start, keep_h, sums, tiling
):  # fmt: skip
    H = pre.shape[1]
    dbias = pre.new_empty(H if sums else 0, dtype=torch.float32)
    dgate_bias = pre.new_empty(H if sums and gate is not None else 0, dtype=torch.float32)
    return pre.new_empty(pre.shape if keep_h else 0), dbias, dgate_bias


op = library.define(
    "linear_dact(Tensor dy, Tensor down, Tensor pre, Tensor? gate, Tensor(a!) dpre, Tensor(b!)? dgate, "
    "Tensor? seed, str activation, float p, SymInt row_start, SymInt col_start, bool keep_h, bool sums, "
    "int[] tiling) -> (Tensor, Tensor, Tensor)",
    linear_dact,
    fake=_fake,
)
