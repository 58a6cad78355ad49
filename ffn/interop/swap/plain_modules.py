"""What the op needs of another library's block, read off its modules for as long as these are plain ones.

Plain means that calling the module does what its class says and nothing else. A replaced, hooked,
parametrized or quantized module, or an activation that is in no row of the table, must be called itself:
`fused` says so by None. It is asked at each call, so whatever is done to a module later takes effect.
"""

from types import MethodType

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook as has_global_hooks

from ffn.nn.plain import is_hooked, plain_parameters

PACKINGS = ("gate_first", "gate_last", "interleaved")
# Products that are no nn.Linear, by full name: whether the weight is kept as (in, out).
TRANSPOSED = {
    "transformers.pytorch_utils.Conv1D": True,
    "transformers.models.falcon.modeling_falcon.FalconLinear": False,
}


def split_packed(packed: Tensor, packing: str) -> tuple[Tensor, Tensor]:
    """(gate, up), each (H, ...): views of a weight (2 H, D) or bias (2 H) that holds both.

    Args:
        packing: where the gate lies: "gate_first" (the first half: Phi-3, SwiGLUPacked), "gate_last" (the
            second: GluMlp, flash-attn) or "interleaved" (the even rows: gpt-oss).

    The two come from one unbind, whose backward is one stack; two slices would each fill a whole gradient.
    """
    if packing == "interleaved":
        gate, up = packed.unflatten(0, (-1, 2)).unbind(1)
    else:
        gate, up = packed.unflatten(0, (2, packed.shape[0] // 2)).unbind(0)
    return (up, gate) if packing == "gate_last" else (gate, up)


def plain_projection(module: nn.Module | None) -> tuple[Tensor, Tensor | None] | None:
    """(weight (out, in), bias) of a plain Linear, or one of transformers' like it, else None.

    A Conv1D keeps its weight as (in, out): what is returned is a view of it.
    """
    if type(module) is nn.Linear:
        return plain_parameters(module)
    transposed = TRANSPOSED.get(f"{type(module).__module__}.{type(module).__qualname__}")
    if module is None or transposed is None or not _is_plain(module):
        return None
    weight, bias = map(module._parameters.get, ("weight", "bias"))
    if type(weight) is not nn.Parameter or (bias is not None and type(bias) is not nn.Parameter):
        return None
    return weight.t() if transposed else weight, bias


def is_plain_input(x: Tensor) -> bool:
    """Whether x is a tensor and no subclass of it, nor a nested one, and no hook watches all modules."""
    return (type(x) is Tensor or type(x) is nn.Parameter) and not x.is_nested and not has_global_hooks()


def _is_plain(module: nn.Module) -> bool:
    """Whether calling the module runs the forward that its class was written with, and no hook."""
    kind, forward = type(module), module.forward
    if type(forward) is not MethodType or forward.__func__ is not kind.forward:
        return False
    if forward.__func__.__module__ != kind.__module__:  # a patch of the class, or inherited
        return False
    return not is_hooked(module)
