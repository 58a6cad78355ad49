"""How the ops are registered with torch, and which of torch's modes and transforms they must heed."""

import threading
from collections.abc import Callable, Sequence

import torch
from torch.autograd import forward_ad

_library = torch.library.Library("ffn", "DEF")


class _Thread(threading.local):
    def __init__(self):
        self.devices: set[torch.device] = set()  # whose contexts are this thread's


_thread = _Thread()


def _enter_context(device: torch.device) -> None:
    """Set the CUDA context of a new thread, as autograd's is: a kernel's tensor descriptors are made before
    the first launch would set it."""
    if device not in _thread.devices:
        torch.cuda.mem_get_info(device)
        _thread.devices.add(device)


def define(schema: str, implementation: Callable, fake: Callable) -> Callable:
    """Register `ffn::name` with one implementation for all devices and its shape rule; returns the op.

    Autograd stays outside, in an autograd.Function: a call costs a few microseconds that way, several
    times less than with torch.library.custom_op.
    """

    def on_its_device(first: torch.Tensor, *rest):
        if not first.is_cuda:
            return implementation(first, *rest)
        with torch.cuda.device(first.device):  # a kernel is launched on the current one
            _enter_context(first.device)
            return implementation(first, *rest)

    name = schema.split("(", 1)[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, on_its_device, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ffn::{name}", fake, lib=_library)
    return getattr(torch.ops.ffn, name).default


_functorch = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
_autograd = torch._C._autograd  # pyright: ignore[reportAttributeAccessIssue]


def constant_in_graphs(function: Callable) -> Callable:
    """What torch.compiler.assume_constant_result does, without its import of the compiler."""
    setattr(function, "_dynamo_marked_constant", True)  # noqa: B010
    return function


@constant_in_graphs  # torch guards a graph by the transforms that it was made under
def needs_textbook() -> bool:
    """Whether torch.func, forward-mode differentiation, torch.jit.trace or torch.export want torch's ops."""
    if _functorch.get_dynamic_layer_stack_depth() > 0 or forward_ad._current_level >= 0:
        return True
    return torch.compiler.is_exporting() or torch._C._get_tracing_state() is not None


def autocasts(x: torch.Tensor) -> bool:
    """Whether autocast is on and casts x: torch leaves float64, integers and meta alone, and so do we."""
    if x.is_cpu:
        on = torch.is_autocast_enabled("cpu")
    else:
        on = not x.is_meta and torch.is_autocast_enabled(x.device.type)
    return on and x.dtype != torch.float64 and x.is_floating_point()


def is_transposed(weight: torch.Tensor) -> bool:
    """Whether a weight (out, in) lies in memory as (in, out), as GPT-2's do: a gradient laid out otherwise
    than its weight is copied by autograd."""
    return weight.stride(0) == 1 < weight.stride(1)


def cast(x: torch.Tensor, *others: torch.Tensor | None) -> list:
    """x and the others in the dtype that autocast wants of x; None stays None."""
    dtype = torch.get_autocast_dtype(x.device.type)
    return [None if t is None else t.to(dtype) for t in (x, *others)]


def wants_autograd(dy: torch.Tensor) -> bool:
    """Whether a rule's backward must be plain torch ops: under create_graph=True, or where dy stands for
    many gradients at once, as those of a vectorised backward do."""
    if torch.compiler.is_compiling():
        return False
    many = _functorch.is_legacy_batchedtensor(dy) or _functorch.is_batchedtensor(dy)
    return many or torch.is_grad_enabled()


def is_last_reader() -> bool:
    """Whether the backward that runs gives up what was saved for it, which it may then write over."""
    if torch.compiler.is_compiling():
        return False
    return not _autograd._get_current_graph_task_keep_graph()


def autograd_gradients(formula: Callable, inputs: Sequence, needs: Sequence[bool], dy: torch.Tensor) -> list:
    """The gradients of formula(*inputs) that are needed, else None, by autograd; see `wants_autograd`."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        cut: list = [None if t is None else t.view_as(t) for t in inputs]  # from how they arose
        y = formula(*cut)
    wanted = [t for t, need in zip(cut, needs, strict=True) if need]
    found = iter(torch.autograd.grad(y, wanted, dy, create_graph=create_graph))
    return [next(found) if need else None for need in needs]
