"""The first product fused with bias, activation, gate and dropout: x is read once and h written once.

A program computes a tile of h; when gated it has two accumulators, one for gate and one for up. The
preactivations are rounded to their storage type before the activation, so backward recomputes the same h.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ffn.ops import library
from ffn.ops.kernels.language import (
    check_offset,
    formula,
    kept,
    nothing,
    pieces,
    rounded,
    rows_of,
    scale,
    threshold,
    tile_of,
)
from ffn.ops.kernels.tilings import Tiling


@triton.jit
def _finish(
    pre, gate, row, col, pre_desc, gate_desc, h_desc, bias_ptr, gate_bias_ptr, seed_ptr, H,
    row_start, col_start, least, factor,
    FORMULA: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr, GATE_BIAS: tl.constexpr,
    DROPOUT: tl.constexpr, KEEP_PRE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Turn the accumulators of a tile (ROWS, COLS) at (row, col) into h, pre and gate; store them."""
    dtype: tl.constexpr = h_desc.dtype
    cols = col + tl.arange(0, COLS)
    if BIAS:
        pre += tl.load(bias_ptr + cols, cols < H, 0.0).to(tl.float32)[None, :]
    x = rounded(pre, dtype)
    if KEEP_PRE:
        pre_desc.store([row, col], x.to(dtype))
    if GATED:
        if GATE_BIAS:
            gate += tl.load(gate_bias_ptr + cols, cols < H, 0.0).to(tl.float32)[None, :]
        g = rounded(gate, dtype)
        if KEEP_PRE:
            gate_desc.store([row, col], g.to(dtype))
        value, _ = FORMULA(g)
        h = value * x
    else:
        h, _ = FORMULA(x)
    if DROPOUT:
        keep = kept(seed_ptr, row_start + row.to(tl.int64), col_start + col, least, ROWS, COLS)
        h = tl.where(keep, h * factor, 0.0)
    h_desc.store([row, col], h.to(dtype))


@triton.jit(do_not_specialize=["N", "row_start", "col_start", "least"])
def _linear_act(
    x_desc, up_desc, gate_w_desc, pre_desc, gate_desc, h_desc, bias_ptr, gate_bias_ptr, seed_ptr,
    N, D, H, row_start, col_start, least, factor,
    FORMULA: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr, GATE_BIAS: tl.constexpr,
    DROPOUT: tl.constexpr, KEEP_PRE: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    tile_row, tile_col = tile_of(tl.program_id(0), N, H, ROWS, COLS, GROUP)
    row, col = tile_row * ROWS, tile_col * COLS
    pre = tl.zeros([ROWS, COLS], tl.float32)
    gate = tl.zeros([ROWS, COLS], tl.float32)
    for k in range(0, D, DEPTH):
        x = x_desc.load([row, k])
        pre = tl.dot(x, up_desc.load([col, k]).T, pre, input_precision="ieee")
        if GATED:
            gate = tl.dot(x, gate_w_desc.load([col, k]).T, gate, input_precision="ieee")
    WIDTH: tl.constexpr = COLS // PARTS
    pres, gates = pieces(pre, PARTS), pieces(gate, PARTS)
    for part in tl.static_range(PARTS):
        _finish(
            pres[part], gates[part], row, col + part * WIDTH, pre_desc, gate_desc, h_desc,
            bias_ptr, gate_bias_ptr, seed_ptr, H, row_start, col_start, least, factor,
            FORMULA, GATED, BIAS, GATE_BIAS, DROPOUT, KEEP_PRE, ROWS, WIDTH,
        )  # fmt: skip


def linear_act(
    x, up, gate_w, bias, gate_bias, seed, activation: str, p: float, row_start: int, col_start: int,
    keep_pre: bool, tiling: list[int],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return (h, pre, gate), each (N, H); pre and gate are empty unless `keep_pre`."""
    check_offset(col_start)
    bias, gate_bias, t = rows_of(bias), rows_of(gate_bias), Tiling(*tiling)
    (N, D), H, gated = x.shape, up.shape[0], gate_w is not None
    h = torch.empty(N, H, dtype=x.dtype, device=x.device)
    pre = torch.empty_like(h) if keep_pre else nothing(h)
    gate = torch.empty_like(h) if keep_pre and gated else nothing(h)
    if h.numel() == 0:
        return h, pre, gate
    inner, outer = [t.rows, t.depth], [t.rows, t.cols // t.parts]
    result = TensorDescriptor.from_tensor(h, outer)
    grid = (triton.cdiv(N, t.rows) * triton.cdiv(H, t.cols),)
    weights = [t.cols, t.depth]
    _linear_act[grid](
        TensorDescriptor.from_tensor(x, inner), TensorDescriptor.from_tensor(up, weights),
        TensorDescriptor.from_tensor(gate_w, weights) if gated else None,
        TensorDescriptor.from_tensor(pre, outer) if keep_pre else None,
        TensorDescriptor.from_tensor(gate, outer) if keep_pre and gated else None,
        result, bias, gate_bias, seed,
        N, D, H, row_start, col_start, threshold(p), scale(p), formula(activation),
        gated, bias is not None, gate_bias is not None, seed is not None, keep_pre,
        t.rows, t.cols, t.depth, t.group, t.parts,
        num_warps=t.warps, num_stages=t.stages, enable_fp_fusion=True,
    )  # fmt: skip
    return h, pre, gate


def _fake(
    x, up, gate_w, bias, gate_bias, seed, activation, p, row_start, col_start, keep_pre, tiling
):  # fmt: skip
    shape = x.shape[0], up.shape[0]
    h, pre = x.new_empty(shape), x.new_empty(shape if keep_pre else 0)
    return h, pre, x.new_empty(shape if keep_pre and gate_w is not None else 0)


op = library.define(
    "linear_act(Tensor x, Tensor up, Tensor? gate_w, Tensor? bias, Tensor? gate_bias, Tensor? seed, "
    "str activation, float p, SymInt row_start, SymInt col_start, bool keep_pre, int[] tiling) "
    "-> (Tensor, Tensor, Tensor)",
    linear_act,
    fake=_fake,
)
