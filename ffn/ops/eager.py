"""The backend in torch ops, for the CPU and for inputs that the kernels do not support.

A backend is a module with five functions:

- `act` and `dact_`: the passes between the products, forward and backward;
- `linear_act` and `linear_dact`: the same passes fused with the product before them, or None to run unfused;
- `noise`: the factors of its dropout.
"""

import torch
from torch import Tensor

from ffn.ops.between import Between, Needs
from ffn.ops.dropout_mask import drop_
from ffn.ops.dropout_mask import noise as noise


def act(pre: Tensor, pre_gate: Tensor | None, between: Between) -> Tensor:
    """Return h (N, H) for the preactivations (N, H)."""
    activation, seed, p, row_start = between
    h = activation(pre) if pre_gate is None else activation(pre_gate).mul_(pre)
    if seed is not None:
        drop_((h,), seed, p, row_start)
    return h


def dact_(dh: Tensor, pre: Tensor, pre_gate: Tensor | None, between: Between, needs: Needs, reuse: bool):
    """Return (dpre, dpre_gate, h, dup_bias, dgate_bias) for dh (N, H); overwrite dh.

    If `reuse`, dpre and dpre_gate overwrite the preactivations.
    """
    activation, seed, p, row_start = between
    value = activation(pre if pre_gate is None else pre_gate)
    h = None
    if needs.h:
        h = value if pre_gate is None else value * pre
    if seed is not None:  # the same mask for both
        drop_((dh,) if h is None else (h, dh), seed, p, row_start)
    dpre, dpre_gate = _through(activation, dh, value, pre, pre_gate, reuse)
    return dpre, dpre_gate, h, *_sums(dpre, dpre_gate, needs)


def linear_act(x: Tensor, up, gate, between: Between, keep: bool) -> None:
    """Return None: torch ops do not fuse the product with the pass."""
    return


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
    """Return (dpre, dpre_gate, ddown, dup_bias, dgate_bias), or None with dropout.

    dh is written into h's memory after the gradients of the product `down` have read h.
    """
    if between.seed is not None:
        return None
    activation = between.activation
    value = activation(pre if pre_gate is None else pre_gate)
    h = value if pre_gate is None else value * pre
    ddown = down.gradients(dy, h, needs_down)
    dh = down.input_gradient(dy, out=h)
    dpre, dpre_gate = _through(activation, dh, value, pre, pre_gate, reuse)
    return dpre, dpre_gate, ddown, *_sums(dpre, dpre_gate, needs)


def _through(activation, dh, value, pre, pre_gate, reuse: bool) -> tuple[Tensor, Tensor | None]:
    """Return (dpre, dpre_gate), written over the preactivations if `reuse`, else over dh and value."""
    if pre_gate is None:
        return activation.grad(dh, pre, out=pre if reuse else dh), None
    into = pre_gate if reuse else torch.empty_like(dh)
    dpre_gate = activation.grad(dh, pre_gate, out=into).mul_(pre)
    return torch.mul(dh, value, out=pre if reuse else value), dpre_gate


def _sums(dpre: Tensor, dpre_gate: Tensor | None, needs: Needs) -> tuple[Tensor | None, Tensor | None]:
    """Return the column sums (H) of both gradients, None where not needed."""
    gate = dpre_gate.sum(0) if needs.gate_bias and dpre_gate is not None else None
    return dpre.sum(0) if needs.up_bias else None, gate
