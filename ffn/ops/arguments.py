"""What `feed_forward` takes: options, shapes, dtypes and devices, and one line where they do not fit."""

from numbers import Integral

from torch import Tensor

from ffn import activations
from ffn.activations import Activation
from ffn.ops import dispatch
from ffn.ops.dropout import check_probability

SAVES = ("preact", "input")


def check_size(name: str, size: int) -> None:
    """Raise ValueError unless size is a whole number, 1 or more."""
    if not isinstance(size, Integral) or isinstance(size, bool) or size < 1:
        raise ValueError(f"{name}={size!r}: want a positive whole number")


def check_options(row: Activation, p: float, save: str, chunk_tokens: int | None, backend: str) -> None:
    """Raise ValueError for a probability, `save`, `chunk_tokens` or `backend` that make no sense."""
    check_probability("dropout", p)
    dispatch.check_backend(backend)
    if save not in SAVES:
        raise ValueError(f"save={save!r}: want one of {', '.join(SAVES)}")
    if chunk_tokens is not None:
        check_size("chunk_tokens", chunk_tokens)
        if save != "input":
            raise ValueError(f"chunk_tokens={chunk_tokens} with save={save!r}: want save='input'")
    if backend == "triton" and row.formula is None:
        raise ValueError(f"backend='triton': no kernel has {row.name}; use 'auto', or a row of the table")
    if save != "preact" and (row.formula is None or backend == "reference"):
        what = "backend='reference'" if backend == "reference" else f"activation {row.name}"
        raise ValueError(
            f"save={save!r}: {what} runs under plain autograd, which keeps what it likes; leave save out"
        )


def fits(row: Activation, x, up, down, gate, up_bias, down_bias, gate_bias) -> bool:
    """Whether shapes, dtypes and devices go together; asked at each call, so it is quick."""
    shape, out_shape, in_shape = up.shape, down.shape, x.shape
    if len(shape) != 2 or len(out_shape) != 2 or not in_shape or row.gated != (gate is not None):
        return False
    H, D = shape
    if in_shape[-1] != D or out_shape[1] != H:
        return False
    dtype, device = x.dtype, x.device
    gate_bias_shape = (H,) if row.gated else None
    for t, want in ((gate, shape), (up_bias, (H,)), (down_bias, out_shape[:1]), (gate_bias, gate_bias_shape)):
        if t is not None and (t.shape != want or t.dtype != dtype or t.device != device):
            return False
    return up.dtype == down.dtype == dtype and up.device == down.device == device and x.is_floating_point()


def explain_misfit(row: Activation, x, up, down, gate, up_bias, down_bias, gate_bias):
    """Raise one line: the rule, what came instead, and the remedy."""
    got = named(x, up, down, gate, up_bias, down_bias, gate_bias)
    given = {name: t for name, t in got.items() if name != "x"}
    H, D = up.shape if up.ndim == 2 else ("H", "D")
    out = down.shape[0] if down.ndim == 2 else "O"
    want = {"gate": (H, D), "up": (H, D), "down": (out, H)}
    want |= {"gate_bias": (H,), "up_bias": (H,), "down_bias": (out,)}
    names = given.keys() | {"gate"} if row.gated else given.keys() - {"gate", "gate_bias"}
    want = {name: shape for name, shape in want.items() if name in names}
    shapes = {name: tuple(t.shape) for name, t in given.items()}
    if not x.ndim or x.shape[-1] != D or shapes != want:
        rule = ", ".join(f"{name} {_shape(shape)}" for name, shape in want.items())
        came = ", ".join(f"{name} {_shape(t.shape)}" for name, t in got.items())
        if row.gated and gate is None:
            came += f"; {row.name} is gated: give gate="
        elif extra := " and ".join(sorted(given.keys() - want.keys())):
            gated = ", ".join(activations.GATES)
            came += f"; {row.name} is not gated: leave {extra} out, or take one of {gated}"
        raise ValueError(f"feed_forward(activation={row.name!r}) wants x (..., {D}), {rule}; got {came}")
    if not x.is_floating_point() or any(t.dtype != x.dtype for t in given.values()):
        came = ", ".join(f"{name} {str(t.dtype)[6:]}" for name, t in got.items())
        raise TypeError(f"feed_forward wants one floating dtype; got {came}; cast by .to(dtype) or autocast")
    came = ", ".join(f"{name} {t.device}" for name, t in got.items())
    raise ValueError(f"feed_forward wants one device; got {came}; move one side with .to(device)")


def named(x, up, down, gate, up_bias, down_bias, gate_bias) -> dict:
    """What was given, by its name; TypeError for what is no tensor."""
    given = {"x": x, "gate": gate, "up": up, "down": down}
    given |= {"gate_bias": gate_bias, "up_bias": up_bias, "down_bias": down_bias}
    for name, t in given.items():
        if not isinstance(t, Tensor) and (t is not None or name in ("x", "up", "down")):
            kind = f"{type(t).__module__}.{type(t).__name__}".removeprefix("builtins.")
            raise TypeError(f"feed_forward: {name} is a {kind}; want a Tensor") from None
    return {name: t for name, t in given.items() if t is not None}


def _shape(shape) -> str:
    return f"({', '.join(map(str, shape))})"
