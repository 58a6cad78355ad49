"""Check that calling a Linear only computes F.linear with its own two parameters."""

from types import MethodType

from torch import Tensor, nn

LINEAR_FORWARD = nn.Linear.forward  # stored at import, so that a later patch of the class is noticed


def is_hooked(module: nn.Module) -> bool:
    """Return True if the module has forward or backward hooks of its own."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def plain_parameters(linear: nn.Module | None) -> tuple[Tensor, Tensor | None] | None:
    """Return (weight, bias) if calling this Linear only computes F.linear with these two, else None."""
    if type(linear) is not nn.Linear:
        return None
    forward = linear.forward  # torch.compile guards the attribute, but not __dict__, against later changes
    if type(forward) is not MethodType or forward.__func__ is not LINEAR_FORWARD or is_hooked(linear):
        return None
    weight, bias = map(linear._parameters.get, ("weight", "bias"))
    if type(weight) is not nn.Parameter or (bias is not None and type(bias) is not nn.Parameter):
        return None
    return weight, bias
