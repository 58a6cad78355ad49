"""Read weights from other libraries' products, as long as these are plain.

Plain means: calling the module runs the forward of its class and nothing else. A replaced, hooked,
parametrized or quantized module must be called itself. This is checked at each call, so a later change takes
effect.
"""

from types import MethodType

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook as has_global_hooks

from ffn.nn.plain import is_hooked, plain_parameters

PACKINGS = ("gate_first", "gate_last", "interleaved")
# Products other than nn.Linear, by full name: True if the weight is (in, out).
TRANSPOSED = {
    "transformers.pytorch_utils.Conv1D": True,
    "transformers.models.falcon.modeling_falcon.FalconLinear": False,
}


def split_packed(packed: Tensor, packing: str) -> tuple[Tensor, Tensor]:
    """Return (gate, up), each (H, ...): views of a packed weight (2 H, D) or bias (2 H).

    Args:
        packing: where the gate lies: "gate_first" (the first half: Phi-3, SwiGLUPacked), "gate_last" (the
            second half: GluMlp, flash-attn) or "interleaved" (the even rows: gpt-oss).

    One unbind makes both views: its backward is one stack, while two slices would each fill a whole gradient.
    """
    if packing == "interleaved":
        gate, up = packed.unflatten(0, (-1, 2)).unbind(1)
    else:
        gate, up = packed.unflatten(0, (2, packed.shape[0] // 2)).unbind(0)
    return (up, gate) if packing == "gate_last" else (gate, up)


def plain_projection(module: nn.Module | None) -> tuple[Tensor, Tensor | None] | None:
    """Return (weight (out, in), bias) of a plain product, else None.

    The weight of a Conv1D is (in, out): a view of it is returned.
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
    """Return whether x is a plain Tensor, not a subclass and not nested, and no global module hook is set."""
    return (type(x) is Tensor or type(x) is nn.Parameter) and not x.is_nested and not has_global_hooks()


def _is_plain(module: nn.Module) -> bool:
    """Return whether calling the module runs the forward written in its class, and no hook."""
    kind, forward = type(module), module.forward
    if type(forward) is not MethodType or forward.__func__ is not kind.forward:
        return False
    if forward.__func__.__module__ != kind.__module__:  # the class is patched, or inherits it
        return False
    return not is_hooked(module)
