"""Whether calling a Linear does nothing but F.linear with its own two parameters."""

from types import MethodType

from torch import Tensor, nn

LINEAR_FORWARD = nn.Linear.forward  # as it was at import: a patch of the class must take effect too


def is_hooked(module: nn.Module) -> bool:
    """Whether a hook of the module's own runs when it is called or differentiated."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def plain_parameters(linear: nn.Module | None) -> tuple[Tensor, Tensor | None] | None:
    """(weight, bias) if calling this Linear does nothing but F.linear with these two plain parameters."""
    if type(linear) is not nn.Linear:
        return None
    forward = linear.forward  # torch.compile watches the attribute, and not __dict__, for a later change
    if type(forward) is not MethodType or forward.__func__ is not LINEAR_FORWARD or is_hooked(linear):
        return None
    weight, bias = map(linear._parameters.get, ("weight", "bias"))
    if type(weight) is not nn.Parameter or (bias is not None and type(bias) is not nn.Parameter):
        return None
    return weight, bias
