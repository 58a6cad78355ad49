"""What the op needs of another library's block, read off its modules for as long as these are plain ones.

Plain means that calling the module does what its class says and nothing else. A replaced, hooked,
parametrized or quantized module, or an activation that is in no row of the table, must be called itself:
`fused` says so by None. It is asked at each call, so whatever is done to a module later takes effect.
"""

from collections.abc import Iterable
from types import MethodType

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook as has_global_hooks

from ffn import activations, ops
from ffn.nn.plain import is_hooked, plain_parameters

PACKINGS = ("gate_first", "gate_last", "interleaved")
# Products that are no nn.Linear, by full name: whether the weight is kept as (in, out).
TRANSPOSED = {
    "transformers.pytorch_utils.Conv1D": True,
    "transformers.models.falcon.modeling_falcon.FalconLinear": False,
}
GATED = {plain: gated for gated, plain in activations.GATES.items()}

# Activations of other libraries that compute exactly a row. By name, so that nothing is imported to ask.
_ROWS = {
    "timm.layers.activations.GELU": "gelu",
    "timm.layers.activations.GELUTanh": "gelu_tanh",
    "timm.layers.activations.QuickGELU": "quick_gelu",
    "timm.layers.activations.Swish": "silu",
    "timm.layers.activations.Sigmoid": "sigmoid",
    "timm.layers.activations.Tanh": "tanh",
    "timm.layers.activations.Mish": "mish",
    "timm.layers.activations_me.SwishMe": "silu",
    "timm.layers.activations_me.MishMe": "mish",
    "transformers.activations.GELUActivation": "gelu",
    "transformers.activations.GELUTanh": "gelu_tanh",
    "transformers.activations.NewGELUActivation": "gelu_tanh",
    "transformers.activations.FastGELUActivation": "gelu_tanh",
    "transformers.activations.AccurateGELUActivation": "gelu_tanh",
    "transformers.activations.QuickGELUActivation": "quick_gelu",
    "transformers.activations.SiLUActivation": "silu",
    "transformers.activations.MishActivation": "mish",
    "transformers.activations.LinearActivation": "identity",
    "transformers.activations.ReLUSquaredActivation": "relu2",
}


def full_name(kind: type) -> str:
    """torch.nn.Linear is "torch.nn.modules.linear.Linear": where the class was written, and its name."""
    return f"{kind.__module__}.{kind.__qualname__}"


def split_packed(packed: Tensor, packing: str) -> tuple[Tensor, Tensor]:
    """(gate, up), each (H, ...): views of a weight (2 H, D) or bias (2 H) that holds both.

    Args:
        packing: where the gate lies: "gate_first" (the first half: Phi-3, SwiGLUPacked), "gate_last" (the
            second: GluMlp, flash-attn) or "interleaved" (the even rows: gpt-oss).

    Raises:
        ValueError: a packing that is none of these, or an odd number of rows.

    The two come from one unbind, whose backward is one stack; two slices would each fill a whole gradient.
    """
    if packing not in PACKINGS:
        raise ValueError(f"packing={packing!r}: want one of {', '.join(PACKINGS)}")
    if packed.shape[0] % 2:
        raise ValueError(f"a packed gate and up want an even number of rows; got {tuple(packed.shape)}")
    if packing == "interleaved":
        gate, up = packed.unflatten(0, (-1, 2)).unbind(1)
    else:
        gate, up = packed.unflatten(0, (2, packed.shape[0] // 2)).unbind(0)
    return (up, gate) if packing == "gate_last" else (gate, up)


def is_plain(module: nn.Module) -> bool:
    """Whether calling the module runs the forward that its class was written with, and no hook."""
    kind, forward = type(module), module.forward
    if type(forward) is not MethodType or forward.__func__ is not kind.forward:
        return False
    if forward.__func__.__module__ != kind.__module__:  # a patch of the class, or inherited
        return False
    return not is_hooked(module)


def row_name(act) -> str | None:
    """The name of the plain row of `ffn.activations.TABLE` that computes this activation, or None.

    Args:
        act: a module of torch.nn, timm or transformers, a function of torch.nn.functional, or anything else,
            which has no row.
    """
    if isinstance(act, nn.Module):
        if not is_plain(act):
            return None
        name = _ROWS.get(full_name(type(act)))
        if name is not None:
            return name
    elif not callable(act):
        return None
    row = activations.resolve(act)
    return None if row.formula is None else row.name


def plain_projection(module: nn.Module | None) -> tuple[Tensor, Tensor | None] | None:
    """(weight (out, in), bias) of a plain Linear, or one of transformers' like it, else None.

    A Conv1D keeps its weight as (in, out): what is returned is a view of it.
    """
    if type(module) is nn.Linear:
        return plain_parameters(module)
    transposed = TRANSPOSED.get(full_name(type(module)))
    if module is None or transposed is None or not is_plain(module):
        return None
    weight, bias = map(module._parameters.get, ("weight", "bias"))
    if type(weight) is not nn.Parameter or (bias is not None and type(bias) is not nn.Parameter):
        return None
    return weight.t() if transposed else weight, bias


def probability(module: nn.Module) -> float | None:
    """The probability at which this module drops now, or None if it does anything else than drop."""
    if not is_plain(module):
        return None
    if type(module) is nn.Identity:
        return 0.0
    if type(module) is not nn.Dropout:
        return None
    p = module.p if module.training else 0.0
    return p if p < 1.0 else None  # the op knows no mask that drops all


def is_plain_input(x: Tensor) -> bool:
    """Whether x is a tensor and no subclass of it, nor a nested one, and no hook watches all modules."""
    return (type(x) is Tensor or type(x) is nn.Parameter) and not x.is_nested and not has_global_hooks()


def drop(x: Tensor, module: nn.Module) -> Tensor:
    """module(x); where that is a plain nn.Dropout its mask is rebuilt in backward and not kept."""
    p = probability(module) if is_plain_input(x) else None
    return module(x) if p is None else ops.dropout(x, p)


def fused(
    x: Tensor,
    act,
    up: nn.Module,
    down: nn.Module,
    gate: nn.Module | None = None,
    *,
    packing: str | None = None,
    between: Iterable[nn.Module] = (),
) -> Tensor | None:
    """down(between(act(up(x)))), gated: down(between(act(gate(x)) * up(x))), by the op and not its modules.

    Args:
        x: (..., D).
        act: what `row_name` takes.
        up, down, gate: Linears, or Conv1Ds of transformers.
        packing: where `up` holds the gate too, how: see `split_packed`.
        between: what stands between the activation and `down`: dropouts, at most one of which drops, and
            Identities.

    Returns:
        (..., O); None where one of the modules is not plain and all of them must be called.
    """
    if not is_plain_input(x):
        return None
    gated = gate is not None or packing is not None
    row, p = row_name(act), 0.0
    row = GATED.get(row) if gated and row is not None else row
    up_pair, down_pair = plain_projection(up), plain_projection(down)
    gate_pair = (None, None) if gate is None else plain_projection(gate)
    if row is None or up_pair is None or down_pair is None or gate_pair is None:
        return None
    for module in between:
        found = probability(module)
        if found is None or found * p > 0.0:
            return None
        p = max(p, found)
    (up_weight, up_bias), (gate_weight, gate_bias) = up_pair, gate_pair
    if packing is not None:
        gate_weight, up_weight = split_packed(up_weight, packing)
        gate_bias, up_bias = (None, None) if up_bias is None else split_packed(up_bias, packing)
    return ops.feed_forward(
        x, up_weight, down_pair[0], gate_weight, up_bias, down_pair[1], gate_bias, activation=row, dropout=p
    )
