"""The table of activations: each row, plain or gated, has one formula x -> (value, slope).

A formula calls functions of a module named `m`: exp, erf, log, sigmoid, abs and where. Any library with these
functions can run it: torch here, Triton in the kernels. `value` is the activation and `slope` its derivative,
so that one call in backward rebuilds both.

A row may also name torch's own forward and backward, which the eager paths prefer because they are faster.
"""

import difflib
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch as m
from torch import Tensor, nn
from torch.nn import functional as F


def identity(x):
    return x, m.where(x == x, 1.0, x)


def relu(x):
    r = m.where(x <= 0.0, 0.0, x)
    return r, m.where(r > 0.0, 1.0, r)


def leaky_relu(x):
    slope = m.where(x > 0.0, 1.0, m.where(x > 0.0, x, 0.01))  # 0.01 in x's own precision
    return x * slope, slope


def relu2(x):
    r = m.where(x <= 0.0, 0.0, x)
    return r * r, 2.0 * r


def sigmoid(x):
    s = m.sigmoid(x)
    return s, s * (1.0 - s)


def tanh(x):
    t = 2.0 * m.sigmoid(2.0 * x) - 1.0
    return t, 1.0 - t * t


def silu(x):
    s = m.sigmoid(x)
    return x * s, s * (1.0 + x * (1.0 - s))


def quick_gelu(x):
    s = m.sigmoid(1.702 * x)
    return x * s, s * (1.0 + 1.702 * x * (1.0 - s))


def gelu(x):
    cdf = 0.5 * (1.0 + m.erf(x * 0.7071067811865476))
    pdf = 0.3989422804014327 * m.exp(-0.5 * x * x)
    return x * cdf, cdf + x * pdf


def gelu_tanh(x):
    z = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    s, c = m.sigmoid(2.0 * z), m.sigmoid(-2.0 * z)  # 0.5 * (1 + tanh z), and 1 - s without cancellation
    dz = 0.7978845608028654 * (1.0 + 0.134145 * x * x)
    return x * s, s + 2.0 * x * s * c * dz


def softplus(x):
    value = m.where(x > 0.0, x, 0.0) + m.log(1.0 + m.exp(-m.abs(x)))
    return value, m.sigmoid(x)


def mish(x):
    n = m.exp(m.where(x > 20.0, 20.0, x))  # beyond 20 tanh(softplus x) is 1 and n * n would overflow
    u = n * (n + 2.0)
    t = u / (u + 2.0)  # tanh(softplus x)
    return x * t, t + x * 4.0 * n * (n + 1.0) / ((u + 2.0) * (u + 2.0))


def _widen(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


@dataclass(frozen=True)
class Activation:
    """One row of the table.

    name: the name in the table.
    formula: x -> (value, slope), both of x's shape; None for a callable that is not in the table.
    forward: torch's own x -> value; None to use the formula.
    backward: torch's own (dvalue, x, grad_input=output buffer, may be dvalue or x) -> gradient of x; None to
        use the formula. A named overload of an ATen op saves the overload lookup in each call.
    gated: whether the block multiplies the value by a second matmul, up.
    """

    name: str
    formula: Callable[[Any], tuple[Any, Any]] | None
    forward: Callable[..., Tensor] | None = None
    backward: Callable[..., Tensor] | None = None
    gated: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        """Return the value for a tensor of any shape and floating dtype; differentiable."""
        if self.forward is not None:
            return self.forward(x)
        assert self.formula is not None
        return self.formula(_widen(x))[0].to(x.dtype)

    def grad(self, dvalue: Tensor, x: Tensor, out: Tensor) -> Tensor:
        """Write the gradient of x, dvalue * slope(x), to `out` and return it; `out` may be dvalue or x.

        Half precision is computed in float32.
        """
        if self.backward is not None:
            return self.backward(dvalue, x, grad_input=out)
        assert self.formula is not None
        return out.copy_(self.formula(_widen(x))[1].mul_(dvalue))


_aten = torch.ops.aten

PLAIN = [
    Activation("identity", identity, torch.clone, lambda dvalue, x, grad_input: grad_input.copy_(dvalue)),
    Activation("relu", relu, F.relu, partial(_aten.threshold_backward.grad_input, threshold=0)),
    Activation("leaky_relu", leaky_relu, F.leaky_relu,
               partial(_aten.leaky_relu_backward.grad_input, negative_slope=0.01, self_is_result=False)),
    Activation("relu2", relu2),
    Activation("gelu", gelu, F.gelu, _aten.gelu_backward.grad_input),
    Activation("gelu_tanh", gelu_tanh, partial(F.gelu, approximate="tanh"),
               partial(_aten.gelu_backward.grad_input, approximate="tanh")),
    Activation("quick_gelu", quick_gelu),
    Activation("silu", silu, F.silu, _aten.silu_backward.grad_input),
    Activation("sigmoid", sigmoid, torch.sigmoid),
    Activation("tanh", tanh, torch.tanh),
    Activation("mish", mish, F.mish,
               lambda dvalue, x, grad_input: grad_input.copy_(_aten.mish_backward.default(dvalue, x))),
    Activation("softplus", softplus, F.softplus,
               partial(_aten.softplus_backward.grad_input, beta=1, threshold=20)),
]  # fmt: skip
GATES = {"glu": "sigmoid", "bilinear": "identity", "reglu": "relu", "geglu": "gelu",
         "geglu_tanh": "gelu_tanh", "swiglu": "silu"}  # fmt: skip

TABLE = {row.name: row for row in PLAIN}
TABLE |= {name: replace(TABLE[gate], name=name, gated=True) for name, gate in GATES.items()}

# Names in other libraries that mean exactly one row: Hugging Face's names, torch's functions.
ALIASES = {"swish": "silu", "linear": "identity", "gelu_python": "gelu"}
ALIASES |= dict.fromkeys(["gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu_accurate"], "gelu_tanh")
FUNCTIONS = {F.relu: "relu", torch.relu: "relu", F.leaky_relu: "leaky_relu", F.gelu: "gelu", F.silu: "silu",
             F.sigmoid: "sigmoid", torch.sigmoid: "sigmoid", F.tanh: "tanh", torch.tanh: "tanh",
             F.mish: "mish", F.softplus: "softplus"}  # fmt: skip


def _module_row(module: nn.Module) -> str | None:
    """Return the name of the row that computes exactly the same as this torch.nn activation, or None."""
    if not type(module).__module__.startswith("torch.nn."):  # a subclass may compute something else
        return None
    match module:
        case nn.GELU():
            return {"none": "gelu", "tanh": "gelu_tanh"}.get(module.approximate)
        case nn.LeakyReLU():
            return "leaky_relu" if module.negative_slope == 0.01 else None
        case nn.Softplus():
            return "softplus" if (module.beta, module.threshold) == (1, 20) else None
    rows = {nn.ReLU: "relu", nn.SiLU: "silu", nn.Sigmoid: "sigmoid", nn.Tanh: "tanh", nn.Mish: "mish",
            nn.Identity: "identity"}  # fmt: skip
    return rows.get(type(module))


def resolve(activation: str | Callable | type[nn.Module] | Activation) -> Activation:
    """Return the row for a name, a torch.nn activation (class or instance) or any callable.

    A callable without a row, or a row that is not in the table, becomes a row without a formula and runs
    through plain autograd.

    Raises:
        ValueError: if the name is neither in the table nor an alias.
        TypeError: if the argument is neither a name nor callable.
    """
    if isinstance(activation, Activation):
        known = activation.formula is None or TABLE.get(activation.name) == activation
        return activation if known else replace(activation, formula=None, forward=activation)
    if isinstance(activation, str):
        name = ALIASES.get(activation, activation)
        if name not in TABLE:
            close = difflib.get_close_matches(activation.lower(), [*TABLE, *ALIASES], 1)
            near = "".join(f"; did you mean {found}?" for found in close)
            raise ValueError(f"activation must be one of {', '.join(TABLE)}; got {activation!r}{near}")
        return TABLE[name]
    if isinstance(activation, type) and issubclass(activation, nn.Module):
        activation = activation()
    if not callable(activation):
        given = type(activation).__name__ if hasattr(activation, "shape") else repr(activation)  # no dump
        raise TypeError(f"activation must be a name, a torch.nn activation or a callable, got {given}")
    if isinstance(activation, nn.Module):
        name = _module_row(activation)
    else:
        name = FUNCTIONS.get(activation) if isinstance(activation, Hashable) else None
    if name is not None:
        return TABLE[name]
    label = getattr(activation, "__name__", type(activation).__name__)
    return Activation(label, formula=None, forward=activation)
