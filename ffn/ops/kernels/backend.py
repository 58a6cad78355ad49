"""The backend in Triton; `ffn.ops.eager` documents the functions of a backend.

Two passes handle every case: `act` after the first product, `dact_` after the product with down. If the table
of tilings has the case, the pass is fused into its product (`linear_act`, `linear_dact`). A few tokens
without dropout run `decode`, which reads the weights once, if no preactivations are kept.
"""

from functools import cache

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from ffn.ops.between import Between, Needs
from ffn.ops.dense import Dense
from ffn.ops.kernels import act as act_kernel
from ffn.ops.kernels import dact as dact_kernel
from ffn.ops.kernels import decode, tilings
from ffn.ops.kernels import linear_act as fused_forward
from ffn.ops.kernels import linear_dact as fused_backward


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    # Triton's interpreter runs kernels on the CPU and supports all features of 9.0.
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


def _tiling(forward: bool, gated: bool, tokens: Tensor, others: list[Tensor], D: int, H: int):
    """Return the tiling if the table has the case and tensor descriptors fit all tensors, else None."""
    if not all(map(_describable, (tokens, *others))):
        return None
    dtype = str(tokens.dtype)[6:]
    found = tilings.choose(forward, _capability(tokens.device), dtype, gated, D, H, tokens.shape[0])
    return None if found is None else list(found)


def _describable(t: Tensor) -> bool:
    """True if t fits a tensor descriptor: rows start at multiples of 16 bytes, with contiguous elements.

    False for subclasses such as fake tensors, since they have no address.
    """
    if type(t) not in (Tensor, nn.Parameter):
        return False
    apart = t.stride(0) >= t.shape[1] and t.stride(0) * t.itemsize % 16 == 0
    return apart and t.stride(1) == 1 and t.data_ptr() % 16 == 0


def _is_few(x: Tensor, up: Tensor, gate: Tensor | None) -> bool:
    """True if `decode` is fastest: so few tokens that reading the weights takes most of the time."""
    most = decode.MOST_TOKENS if x.itemsize == 2 else 1  # float32 has no tensor cores
    rows = up.stride(1) == 1 and (
        gate is None or gate.stride(1) == 1
    )  # else each call would copy the weights
    return x.shape[0] <= most and rows


def act(pre: Tensor, pre_gate: Tensor | None, between: Between) -> Tensor:
    """Return h (N, H) for the preactivations (N, H)."""
    activation, seed, p, row_start = between
    return act_kernel.op(pre, pre_gate, seed, activation.name, p, row_start, 0)


def dact_(dh: Tensor, pre: Tensor, pre_gate: Tensor | None, between: Between, needs: Needs, reuse: bool):
    """Return (dpre, dpre_gate, h, dup_bias, dgate_bias) for dh (N, H); h overwrites dh.

    If `reuse`, dpre and dpre_gate overwrite the preactivations.
    """
    activation, seed, p, row_start = between
    dpre, dpre_gate = _place(pre, reuse), None if pre_gate is None else _place(pre_gate, reuse)
    sums = needs.up_bias or needs.gate_bias
    found = dact_kernel.op(
        dh, pre, pre_gate, dpre, dpre_gate, seed, activation.name, p, row_start, 0, needs.h, sums
    )
    return dpre, dpre_gate, dh, *_sums(found, needs, dh.dtype)


def linear_act(x: Tensor, up, gate, between: Between, keep: bool):
    """Return (h, pre, pre_gate) of dense products, or None if not fused; pre and pre_gate only if `keep`."""
    if type(up) is not Dense or not (gate is None or type(gate) is Dense):
        return None
    activation, seed, p, row_start = between
    gate_w, gate_bias = (None, None) if gate is None else gate
    if not keep and seed is None and _is_few(x, up.weight, gate_w):
        return decode.op(x, up.weight, gate_w, up.bias, gate_bias, activation.name), None, None
    H, D = up.weight.shape
    if H * up.weight.itemsize % 16:
        return None
    weights = [up.weight] if gate is None else [up.weight, gate.weight]
    tiling = _tiling(True, gate is not None, x, weights, D, H)
    if tiling is None:
        return None
    h, pre, pre_gate = fused_forward.op(
        x, up.weight, gate_w, up.bias, gate_bias, seed, activation.name, p, row_start, 0, keep, tiling
    )
    return h, pre if keep else None, pre_gate if keep and gate is not None else None


def linear_dact(
    dy: Tensor,
    down,
    needs_down,
    pre: Tensor,
    pre_gate: Tensor | None,
    between: Between,
    needs: Needs,
    reuse: bool,
):
    """Return (dpre, dpre_gate, ddown, dup_bias, dgate_bias) of a dense product, or None if not fused."""
    if type(down) is not Dense:
        return None
    saved = [down.weight, pre] if pre_gate is None else [down.weight, pre, pre_gate]
    tiling = _tiling(False, pre_gate is not None, dy, saved, *down.weight.shape)
    if tiling is None:
        return None
    activation, seed, p, row_start = between
    dpre, dpre_gate = _place(pre, reuse), None if pre_gate is None else _place(pre_gate, reuse)
    sums = needs.up_bias or needs.gate_bias
    given = pre, pre_gate, dpre, dpre_gate, seed, activation.name, p, row_start, 0, needs.h, sums
    h, *found = fused_backward.op(dy, down.weight, *given, tiling)
    return dpre, dpre_gate, down.gradients(dy, h, needs_down), *_sums(found, needs, dy.dtype)


def _sums(found, needs: Needs, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """Return the column sums (H) cast to dtype, None where not needed."""
    dup_bias, dgate_bias = found
    return dup_bias.to(dtype) if needs.up_bias else None, dgate_bias.to(dtype) if needs.gate_bias else None


def _place(pre: Tensor, reuse: bool) -> Tensor:
    """Return the tensor for the gradient of pre (N, H): pre itself if `reuse`, else a new one."""
    if reuse and pre.is_contiguous():
        return pre
    return torch.empty(pre.shape, dtype=pre.dtype, device=pre.device)


def noise(seed: Tensor, rows: int, cols: int, p: float, dtype: torch.dtype, row_start: int = 0) -> Tensor:
    """Return the factors 0 or 1 / (1 - p) of this backend's dropout: (rows, cols)."""
    return drop(torch.ones(rows, cols, dtype=dtype, device=seed.device), seed, p, row_start)


def drop(x: Tensor, seed: Tensor, p: float, row_start: int = 0) -> Tensor:
    """Return x (rows, cols) times the factors of `noise`."""
    return act_kernel.op(x, None, seed, "identity", p, row_start, 0)


@register_flop_formula([torch.ops.ffn.linear_act, torch.ops.ffn.decode])
def _flops_forward(x, up, gate_w, *_, **__) -> int:
    """Return the FLOPs for these shapes. Works in FlopCounterModes created after this file is imported."""
    return 2 * x[0] * x[1] * up[0] * (1 if gate_w is None else 2)


@register_flop_formula(torch.ops.ffn.linear_dact)
def _flops_backward(dy, down, *_, **__) -> int:
    return 2 * dy[0] * dy[1] * down[1]
