"""The backend's functions, by the names that the rule calls, over the kernels' ops.

Two passes serve every case: `act` behind the first product, `dact` behind the product with down. Where the
table of tilings says that it pays, a pass moves into its product (`linear_act`, `linear_dact`), and a few
tokens without gradients take one pass over the weights (`decode`).
"""

from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from ffn.activations import Activation
from ffn.ops.kernels import act, dact, decode, tilings
from ffn.ops.kernels import linear_act as fused_forward
from ffn.ops.kernels import linear_dact as fused_backward
from ffn.ops.library import is_transposed


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    # The interpreter, which runs kernels on the CPU, takes what the newest kernels use.
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


def _tiling(forward: bool, gated: bool, tokens: Tensor, others: list[Tensor], D: int, H: int):
    """The tiling, if the table wants the product fused and the copy engine can read every row; else None.

    A compiler gets the product apart from the pass: it has products of its own, for any count of tokens.
    """
    if torch.compiler.is_compiling() or not all(map(_describable, (tokens, *others))):
        return None
    dtype = str(tokens.dtype)[6:]
    found = tilings.choose(forward, _capability(tokens.device), dtype, gated, D, H, tokens.shape[0])
    return None if found is None else list(found)


def _describable(t: Tensor) -> bool:
    """Whether rows follow one another from multiples of 16 bytes on, their elements side by side.

    Of a subclass, as a fake tensor is, nobody knows where it lies.
    """
    if type(t) not in (Tensor, nn.Parameter):
        return False
    apart = t.stride(0) >= t.shape[1] and t.stride(0) * t.itemsize % 16 == 0
    return apart and t.stride(1) == 1 and t.data_ptr() % 16 == 0


def _is_few(x: Tensor, up: Tensor, gate: Tensor | None) -> bool:
    """Whether `decode` serves so many tokens as fast as the weights can be read."""
    most = decode.MOST_TOKENS if x.itemsize == 2 else 1  # no tensor cores for more in float32
    rows = up.stride(1) == 1 and (gate is None or gate.stride(1) == 1)  # others would be copied at each call
    return x.shape[0] <= most and rows


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, onednn: bool) -> Tensor:
    """x (N, in) -> (N, out)."""
    return F.linear(x, weight, bias)


def linear_act(
    x: Tensor, up: Tensor, up_bias: Tensor | None, gate: Tensor | None, gate_bias: Tensor | None,
    activation: Activation, seed: Tensor | None, p: float, row_start: int, onednn: bool, keep: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """(h, pre, pre_gate), each (N, H); the preactivations only if `keep`."""
    name = activation.name
    if not keep and seed is None and not torch.compiler.is_compiling() and _is_few(x, up, gate):
        return decode.op(x, up, gate, up_bias, gate_bias, name), None, None
    H, D = up.shape
    weights = [up] if gate is None else [up, gate]
    tiling = _tiling(True, gate is not None, x, weights, D, H) if H * up.itemsize % 16 == 0 else None
    if tiling is None:
        pre, pre_gate = linear_pre(x, up, up_bias, gate, gate_bias, onednn)
        return activate(pre, pre_gate, activation, seed, p, row_start), pre, pre_gate
    h, pre, pre_gate = fused_forward.op(
        x, up, gate, up_bias, gate_bias, seed, name, p, row_start, 0, keep, tiling
    )  # fmt: skip
    return h, pre if keep else None, pre_gate if keep and gate is not None else None


def linear_pre(
    x: Tensor, up: Tensor, up_bias: Tensor | None, gate: Tensor | None, gate_bias: Tensor | None,
    onednn: bool, after: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """(pre, pre_gate), each (N, H): the first product; compiled, it waits for `after` to exist."""
    if after is not None and torch.compiler.is_compiling():
        x = torch.ops.ffn.after.default(x, after)
    return F.linear(x, up, up_bias), None if gate is None else F.linear(x, gate, gate_bias)


def activate(
    pre: Tensor, pre_gate: Tensor | None,
    activation: Activation, seed: Tensor | None, p: float, row_start: int,
) -> Tensor:  # fmt: skip
    """h (N, H) from the preactivations."""
    return act.op(pre, pre_gate, seed, activation.name, p, row_start, 0)


def dactivate_(
    dh: Tensor, pre: Tensor, pre_gate: Tensor | None,
    activation: Activation, seed: Tensor | None, p: float, row_start: int, reuse: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
    """(dpre, dpre_gate, h), each (N, H): h written over dh, the others over the preactivations if `reuse`."""
    dpre, dpre_gate = _place(pre, reuse), None if pre_gate is None else _place(pre_gate, reuse)
    dact.op(dh, pre, pre_gate, dpre, dpre_gate, seed, activation.name, p, row_start, 0, True, False)
    return dpre, dpre_gate, dh


def linear_dact(
    dy: Tensor, down: Tensor, pre: Tensor, pre_gate: Tensor | None,
    activation: Activation, seed: Tensor | None, p: float, row_start: int,
    need_down: bool, need_up_bias: bool, need_gate_bias: bool, reuse: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """(dpre, dpre_gate, ddown, dup_bias, dgate_bias): back through the second product and the activation."""
    gated, sums = pre_gate is not None, need_up_bias or need_gate_bias
    dpre, dpre_gate = _place(pre, reuse), None if pre_gate is None else _place(pre_gate, reuse)
    given = pre, pre_gate, dpre, dpre_gate, seed, activation.name, p, row_start, 0, need_down, sums
    saved = [down, pre] if pre_gate is None else [down, pre, pre_gate]
    tiling = _tiling(False, gated, dy, saved, *down.shape)
    if tiling is None:
        h = dy @ down  # dh, which becomes h
        dbias, dgate_bias = dact.op(h, *given)
    else:
        h, dbias, dgate_bias = fused_backward.op(dy, down, *given, tiling)
    return (
        dpre,
        dpre_gate,
        None if not need_down else (h.t() @ dy).t() if is_transposed(down) else dy.t() @ h,
        dbias.to(dy.dtype) if need_up_bias else None,
        dgate_bias.to(dy.dtype) if need_gate_bias else None,
    )


def _place(pre: Tensor, reuse: bool) -> Tensor:
    """Where the gradient of a preactivation (N, H) is written."""
    if reuse and pre.is_contiguous():
        return pre
    return torch.empty(pre.shape, dtype=pre.dtype, device=pre.device)


def noise(seed: Tensor, rows: int, cols: int, p: float, dtype: torch.dtype, row_start: int = 0) -> Tensor:
    """The factors 0 or 1 / (1 - p) of this backend's dropout: (rows, cols)."""
    return drop(torch.ones(rows, cols, dtype=dtype, device=seed.device), seed, p, row_start)


def drop(x: Tensor, seed: Tensor, p: float, row_start: int = 0) -> Tensor:
    """x (rows, cols) times these factors."""
    return act.op(x, None, seed, "identity", p, row_start, 0)


@register_flop_formula([torch.ops.ffn.linear_act, torch.ops.ffn.decode])
def _flops_forward(x, up, gate_w, *_, **__) -> int:
    """Of shapes, as the one below, for FlopCounterModes made after this file is loaded: by a first call."""
    return 2 * x[0] * x[1] * up[0] * (1 if gate_w is None else 2)


@register_flop_formula(torch.ops.ffn.linear_dact)
def _flops_backward(dy, down, *_, **__) -> int:
    return 2 * dy[0] * dy[1] * down[1]
