"""The first product fused with bias, activation and gate, for few tokens: reading the weights takes the time.

A program handles some rows of the weights and all tokens. It loops over D with several steps of loads in
flight, reads each weight once and writes h once. One token is multiplied and summed elementwise; more tokens
are padded to a tile for tl.dot. Preactivations are rounded to their storage type before the activation.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ffn.ops import library
from ffn.ops.kernels.language import formula, rounded, rows_of

MOST_TOKENS = 32
PROGRAMS = 128  # enough to keep every SM of a large GPU reading
STEP = 2048  # bytes of a weight that a warp reads per step; two or three steps are in flight at any time
STAGES = 4


class Tile(NamedTuple):
    """Sizes of a program.

    tokens: N, padded. rows, depth: rows and columns of a weight that one step reads. warps: per program.
    """

    tokens: int
    rows: int
    depth: int
    warps: int


def tile(N: int, H: int, itemsize: int, gated: bool, aligned: bool) -> Tile:
    """Return the sizes for N tokens and H rows.

    Twice the rows halve the reads of x, if enough programs are left. aligned: loads can be wide.
    """
    tokens = next(size for size in (1, 16, MOST_TOKENS) if size >= N)
    rows, warps = max(tokens, 16), 4
    if tokens > 1 and itemsize == 4:
        warps = tokens // 4  # without tensor cores the operands are in registers
    elif tokens > 1 and 2 * rows * PROGRAMS <= H:
        rows *= 2
    elif tokens > 1 and gated:
        warps = 2  # two dots of a square tile are split by tokens, so each warp reads all the weights
    step = min(warps, 4) * STEP
    if not aligned:
        step //= 2  # narrow loads need more registers for addresses
    return Tile(tokens, rows, step // (rows * itemsize), warps)


@triton.jit
def _more(total, x, w, TOKENS: tl.constexpr):
    """Return total (TOKENS, ROWS) + x (TOKENS, DEPTH) w (ROWS, DEPTH)^T; one token is summed later."""
    if TOKENS == 1:
        total += x.to(tl.float32) * w.to(tl.float32)
    else:
        total = tl.dot(x, w.T, total, input_precision="ieee")
    return total


@triton.jit
def _sum(total, bias, TOKENS: tl.constexpr, dtype: tl.constexpr):
    """Return the preactivations (TOKENS, ROWS), rounded as if stored and read back."""
    if TOKENS == 1:
        total = tl.sum(total, 1)[None, :]
    return rounded(total + bias, dtype)


@triton.jit(do_not_specialize=["N"])
def _decode(
    x_ptr, up_ptr, gate_w_ptr, bias_ptr, gate_bias_ptr, h_ptr,
    N, D, H, x_stride, up_stride, gate_w_stride,
    FORMULA: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr, GATE_BIAS: tl.constexpr,
    EVEN: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = h_ptr.dtype.element_ty
    tokens = tl.arange(0, TOKENS).to(tl.int64)[:, None]
    row = tl.program_id(0).to(tl.int64) * ROWS
    rows, units = row + tl.arange(0, ROWS)[:, None], row + tl.arange(0, ROWS)[None, :]
    # Load the biases first, so that they arrive with the first step.
    bias = tl.load(bias_ptr + units, units < H, 0.0).to(tl.float32) if BIAS else 0.0
    gate_bias = tl.load(gate_bias_ptr + units, units < H, 0.0).to(tl.float32) if GATE_BIAS else 0.0
    HEIGHT: tl.constexpr = ROWS if TOKENS == 1 else TOKENS
    WIDTH: tl.constexpr = DEPTH if TOKENS == 1 else ROWS
    pre, gate = tl.zeros([HEIGHT, WIDTH], tl.float32), tl.zeros([HEIGHT, WIDTH], tl.float32)
    for start in tl.range(0, D, DEPTH, num_stages=STAGES):
        cols = start + tl.arange(0, DEPTH)[None, :]
        of_x = tokens < N if EVEN else (tokens < N) & (cols < D)
        of_w = rows < H if EVEN else (rows < H) & (cols < D)
        x = tl.load(x_ptr + tokens * x_stride + cols, of_x, 0.0)
        pre = _more(pre, x, tl.load(up_ptr + rows * up_stride + cols, of_w, 0.0), TOKENS)
        if GATED:
            gate = _more(gate, x, tl.load(gate_w_ptr + rows * gate_w_stride + cols, of_w, 0.0), TOKENS)
    pre = _sum(pre, bias, TOKENS, dtype)
    if GATED:
        value, _ = FORMULA(_sum(gate, gate_bias, TOKENS, dtype))
        h = value * pre
    else:
        h, _ = FORMULA(pre)
    tl.store(h_ptr + tokens * H + units, h.to(dtype), (tokens < N) & (units < H))


def decode(x, up, gate_w, bias, gate_bias, activation: str) -> Tensor:
    """Return h (N, H) for x (N, D) and up, gate_w (H, D). For inference: no preactivations are returned.

    Raises:
        ValueError: x has more than MOST_TOKENS tokens.
    """
    (N, D), H, gated = x.shape, up.shape[0], gate_w is not None
    if N > MOST_TOKENS:
        raise ValueError(f"x must have at most {MOST_TOKENS} tokens, got {N}: use ffn::linear_act")
    h = torch.empty(N, H, dtype=x.dtype, device=x.device)
    if h.numel() == 0:
        return h
    x, up, gate_w, bias, gate_bias = map(rows_of, (x, up, gate_w, bias, gate_bias))
    strides = x.stride(0), up.stride(0), gate_w.stride(0) if gated else 0
    t = tile(N, H, x.itemsize, gated, aligned=all(size % 16 == 0 for size in (D, *strides)))
    _decode[(triton.cdiv(H, t.rows),)](
        x, up, gate_w, bias, gate_bias, h,
        N, D, H, *strides, formula(activation), gated, bias is not None, gate_bias is not None,
        D % t.depth == 0, t.tokens, t.rows, t.depth, STAGES, num_warps=t.warps, enable_fp_fusion=True,
    )  # fmt: skip
    return h


op = library.define(
    "decode(Tensor x, Tensor up, Tensor? gate_w, Tensor? bias, Tensor? gate_bias, str activation) -> Tensor",
    decode,
    fake=lambda x, up, gate_w, bias, gate_bias, activation: x.new_empty(x.shape[0], up.shape[0]),
)
