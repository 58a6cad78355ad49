"""Check the arguments of `feed_forward`: options, shapes, dtypes and devices."""

from numbers import Integral

import torch
from torch import Tensor

from ffn import activations
from ffn.activations import Activation
from ffn.ops import dispatch
from ffn.ops.dropout import check_probability

SAVES = ("preact", "input")


def check_size(name: str, size: int) -> None:
    """Raise ValueError unless size is a positive integer."""
    if not isinstance(size, Integral) or isinstance(size, bool) or size < 1:
        raise ValueError(f"{name} must be a positive integer, got {size!r}")


def check_options(row: Activation, p: float, save: str, chunk_tokens: int | None, backend: str) -> None:
    """Raise ValueError if dropout, `save`, `chunk_tokens` or `backend` is wrong, or two of them conflict."""
    check_probability("dropout", p)
    dispatch.check_backend(backend)
    if save not in SAVES:
        raise ValueError(f"save must be one of {', '.join(SAVES)}, got {save!r}")
    if chunk_tokens is not None:
        check_size("chunk_tokens", chunk_tokens)
        if save != "input":
            raise ValueError(f"save must be 'input' with chunk_tokens, got {save!r}")
    if backend == "triton" and row.formula is None:
        raise ValueError(f"backend must be 'auto' for {row.name}, which has no kernel, got 'triton'")
    if save != "preact" and (row.formula is None or backend == "reference"):
        what = "backend='reference'" if backend == "reference" else f"activation {row.name}"
        raise ValueError(f"save must be 'preact' with {what}, which runs under plain autograd, got {save!r}")


def fits(row: Activation, x: Tensor, products: tuple, autocast: bool = False) -> bool:
    """True if shapes, dtypes and devices fit together. It runs at each call, so it is fast.

    products: up, down and gate. autocast: skip the dtypes, since autocast casts them.
    """
    (up, up_bias), (down, down_bias) = products[0][:2], products[1][:2]
    gate, gate_bias = products[2][:2] if products[2] is not None else (None, None)
    if up.ndim != 2 or down.ndim != 2 or not x.ndim or row.gated != (gate is not None):
        return False
    shape = H, D = up.shape
    out, width = down.shape
    if x.shape[-1] != D or width != H or not x.is_floating_point():
        return False
    dtype, device = x.dtype, x.device
    weights = (up, shape), (down, (out, H)), (gate, shape)
    biases = (up_bias, (H,)), (down_bias, (out,)), (gate_bias, (H,))
    for t, size in weights + biases:
        if t is None:
            continue
        if t.shape != size or t.device != device or not (autocast or t.dtype == dtype):
            return False
    if gate is None and gate_bias is not None:
        return False
    return not any(q is not None and len(q) > 2 and q.misfit() for q in products)


def explain_misfit(row: Activation, x: Tensor, products: tuple):
    """Raise the error that names the first argument that does not fit."""
    got = named(x, products)
    given = {name: t for name, t in got.items() if name != "x"}
    up, down = given["up"], given["down"]
    if up.ndim != 2:
        raise ValueError(f"up must be (H, D), got {_shape(up.shape)}")
    H, D = up.shape
    out = down.shape[0] if down.ndim == 2 else "O"
    rule = {"gate": (H, D), "up": (H, D), "down": (out, H)}
    rule |= {"gate_bias": (H,), "up_bias": (H,), "down_bias": (out,)}
    if row.gated and "gate" not in given:
        raise ValueError(f"gate must be given for the gated activation {row.name!r}, got None")
    extra = [name for name in ("gate", "gate_bias") if name in given]
    if extra and not row.gated:
        gated = ", ".join(activations.GATES)
        shape = _shape(got[extra[0]].shape)
        raise ValueError(
            f"{extra[0]} must be None for the plain activation {row.name!r}, got {shape}: {gated} are gated"
        )
    for name, t in [*given.items(), ("x", x)]:
        if name == "x":
            if not x.ndim or x.shape[-1] != D:
                raise ValueError(f"x must be (..., {D}) to match up, got {_shape(x.shape)}")
        elif tuple(t.shape) != rule[name]:
            raise ValueError(f"{name} must be {_shape(rule[name])}, got {_shape(t.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, got {_name(x.dtype)}")
    for name, t in given.items():
        if t.dtype != x.dtype:
            raise TypeError(
                f"{name} must be {_name(x.dtype)} like x, got {_name(t.dtype)}: use .to(dtype) or autocast"
            )
        if t.device != x.device:
            raise ValueError(f"{name} must be on {x.device} like x, got {t.device}: move it with .to(device)")
    for product in products:
        if product is not None and len(product) > 2 and (line := product.misfit()):
            raise ValueError(line)


def named(x, products) -> dict:
    """Return the given tensors by name; raise TypeError if one is not a tensor."""
    up, down, gate = products
    given = {"x": x, "gate": gate and gate.weight, "up": up.weight, "down": down.weight}
    given |= {"gate_bias": gate and gate.bias, "up_bias": up.bias, "down_bias": down.bias}
    for name, t in given.items():
        if not isinstance(t, Tensor) and (t is not None or name in ("x", "up", "down")):
            kind = f"{type(t).__module__}.{type(t).__name__}".removeprefix("builtins.")
            raise TypeError(f"{name} must be a Tensor, got {kind}") from None
    return {name: t for name, t in given.items() if t is not None}


def _shape(shape) -> str:
    return f"({', '.join(map(str, shape))})"


def _name(dtype: torch.dtype) -> str:
    return str(dtype)[6:]
