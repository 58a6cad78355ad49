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
    up, down, gate = products
    shape, out_shape, in_shape = up[0].shape, down[0].shape, x.shape
    if len(shape) != 2 or len(out_shape) != 2 or not in_shape or row.gated != (gate is not None):
        return False
    if in_shape[-1] != shape[1] or out_shape[1] != shape[0] or not x.is_floating_point():
        return False
    dtype, device = x.dtype, x.device
    for product, size in ((up, shape), (down, out_shape), (gate, shape)):
        if product is None:
            continue
        weight, bias = product[0], product[1]
        if weight is None or weight.shape != size or weight.device != device:
            return False
        if bias is not None and (bias.shape != (size[0],) or bias.device != device):
            return False
        if not autocast and (weight.dtype != dtype or (bias is not None and bias.dtype != dtype)):
            return False
        if len(product) > 2 and product.misfit():
            return False
    return True


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
