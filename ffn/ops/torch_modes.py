"""Query torch's modes: compiling, autocast, transforms, double backward, retain_graph."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

_functorch = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
_autograd = torch._C._autograd  # pyright: ignore[reportAttributeAccessIssue]


def constant_in_graphs(function: Callable) -> Callable:
    """Mark a function as constant for Dynamo: torch.compiler.assume_constant_result without its import."""
    setattr(function, "_dynamo_marked_constant", True)  # noqa: B010
    return function


@constant_in_graphs  # safe, since torch guards each compiled graph by the active transforms
def needs_reference() -> bool:
    """True under torch.func, forward-mode differentiation, torch.jit.trace or torch.export."""
    if _functorch.get_dynamic_layer_stack_depth() > 0 or forward_ad._current_level >= 0:
        return True
    return torch.compiler.is_exporting() or torch._C._get_tracing_state() is not None


def autocasts(x: Tensor) -> bool:
    """True if autocast is on and casts x; as in torch, it does not cast float64, integer and meta tensors."""
    if x.is_cpu:
        on = torch.is_autocast_enabled("cpu")
    else:
        on = not x.is_meta and torch.is_autocast_enabled(x.device.type)
    return on and x.dtype != torch.float64 and x.is_floating_point()


def wants_autograd(dy: Tensor) -> bool:
    """True if a rule's backward must run differentiable torch ops.

    That is under create_graph=True, and when dy is a batch of gradients, as in a vectorised backward.
    """
    if torch.compiler.is_compiling():
        return False
    many = _functorch.is_legacy_batchedtensor(dy) or _functorch.is_batchedtensor(dy)
    return many or torch.is_grad_enabled()


def is_last_reader() -> bool:
    """True if backward runs without retain_graph, so that it may overwrite the saved tensors.

    A saved-tensor hook that keeps the tensor itself, and no copy, sees it overwritten too.
    """
    if torch.compiler.is_compiling():
        return False
    return not _autograd._get_current_graph_task_keep_graph()


def autograd_gradients(formula: Callable, inputs: Sequence, needs: Sequence[bool], dy: Tensor) -> list:
    """Return the gradients of formula(*inputs) by autograd, None where not needed."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        cut: list = [None if t is None else t.view_as(t) for t in inputs]  # without their autograd history
        y = formula(*cut)
    wanted = [t for t, need in zip(cut, needs, strict=True) if need]
    found = iter(torch.autograd.grad(y, wanted, dy, create_graph=create_graph))
    return [next(found) if need else None for need in needs]
