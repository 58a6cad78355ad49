"""Packing: faster inference on the CPU from copies of the weights, in their own precision or in int8.

`pack` converts a model until `unpack`. A packed module keeps its parameters and children. It gets a `forward`
(`ffn.packing.forwards`) that reads copies (`ffn.packing.float_copies`, `ffn.packing.int8_copies`).
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ffn.nn.attention import Attention
from ffn.nn.embedding import Embedding
from ffn.nn.eval_mode import eval_mode
from ffn.nn.feed_forward import FeedForward
from ffn.nn.head import Head
from ffn.nn.plain import LINEAR_FORWARD
from ffn.packing.float_copies import Packed, Tensors
from ffn.packing.forwards import (
    PackedAttention,
    PackedBlock,
    PackedForward,
    PackedHead,
    PackedLinear,
    must_run_as_written,
)
from ffn.packing.int8_copies import Quantized

WORTH_PACKING = 1 << 18  # elements of a weight; below, a call costs more than reading the weight
FORMS: dict[str, type[Packed]] = {"float": Packed, "int8": Quantized}
BY_FORWARD: dict[Callable, type[PackedForward]] = {
    FeedForward.forward: PackedBlock,
    Attention.forward: PackedAttention,
    Head.forward: PackedHead,
    LINEAR_FORWARD: PackedLinear,
}
M = TypeVar("M", bound=nn.Module)


def pack(model: M, form: str = "float") -> M:
    """Copy a model's weights for inference on the CPU, and read the copies until `unpack`.

    It packs the FeedForwards, Attentions, Heads and other Linears that are plain and have a weight of 2**18
    elements or more. They read the copies under `torch.no_grad` or `torch.inference_mode`. Other calls run as
    before: with gradients, dropout, autocast, torch.compile, export or torch.func, and those of a block or
    attention with a child that is hooked, replaced or parametrized.

    The copies take as much memory as the weights (int8: two bytes per element). Each call compares the
    weights with the copied ones, and copies a changed one anew: after `load_state_dict`, `.to()`, a new
    Parameter, or any in-place operation that torch counts. A write that torch does not count is not seen:
    through `weight.data`, numpy or another process, or by an optimizer with fused=True. Call `pack` again
    after such a write.

    A state dict holds no copies. A deep copy and a pickle of the model are packed and make their own copies
    at their first call. A shallow copy calls the original.

    Args:
        model: any module; packing one that is packed copies all its weights anew.
        form: "float" keeps the weights as they are. "int8" is for decoding: it rounds each row of a weight,
            and each token as it comes, to 255 steps. It reads a quarter of the bytes, with an error of about
            1% per matmul, which `packing_error` measures.

    Returns:
        the model itself.

    Raises:
        TypeError: model is not a torch module.
        ValueError: form is unknown; model has nothing to pack; or a weight to pack is not float32 or bfloat16
            on the CPU, or is not supported by oneDNN on this processor.

    >>> block = pack(FeedForward(768, 3072)).eval()
    >>> with torch.no_grad():
    ...     y = block(torch.randn(16, 768))
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch module, got a {type(model).__name__}")
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
    packed = _packed(model)
    unpack(model)
    reason = why_not_pack(model, form)
    if reason is not None:
        _put_in_place(packed.values())
        raise ValueError(reason)
    packed.clear()  # frees the old copies
    found = list(_packable(model, FORMS[form]))
    for forward, tensors in found:
        forward.copy(tensors)
    _put_in_place(forward for forward, _ in found)
    return model


def unpack(model: M) -> M:
    """Undo `pack`: drop the copies and run the forwards of the classes again. Returns the model."""
    for module in _packed(model):
        del module.forward
    return model


def why_not_pack(model: nn.Module, form: str = "float") -> str | None:
    """Return why `pack` would refuse a model that is not packed, or None if it would not."""
    found = list(_packable(model, FORMS[form]))
    if not found:
        what = f"no plain FeedForward, Attention, Linear or Head with a weight of {WORTH_PACKING} elements"
        return f"model, a {type(model).__name__}, has nothing to pack: {what} or more; leave it unpacked"
    names = {id(p): name for name, p in model.named_parameters(remove_duplicate=False)}
    for forward, tensors in found:
        for tensor in tensors:
            reason = None if tensor is None or tensor.ndim != 2 else forward.kind.why_not(tensor)
            if reason is not None:
                return f"model, a {type(model).__name__}, cannot be packed: {names[id(tensor)]} is {reason}"
    return None


@contextmanager
def packed_where_possible(model: nn.Module) -> Iterator[None]:
    """Pack an unpacked model inside the context if `pack` takes it, and unpack it afterwards.

    Under autocast nothing is packed, since nothing would read the copies.
    """
    if why_not_pack(model) is None and not torch.is_autocast_enabled("cpu"):
        pack(model)
    try:
        yield
    finally:
        unpack(model)


@torch.no_grad()
def packing_error(model: nn.Module, *inputs: Any) -> dict[str, float]:
    """Return the relative error that packing adds, ||packed - plain|| / ||plain||, per module.

    Args:
        model: a packed model that returns a tensor. It runs in eval mode.
        inputs: of the model.

    Returns:
        the error of the whole model under "", then that of each packed module, given the inputs that it gets
        in the plain model; inf where only the plain output is 0.

    Raises:
        ValueError: nothing in the model is packed, or autocast, a global hook or a transform is on.
        TypeError: the output is not a tensor.

    >>> block = pack(FeedForward(768, 3072), "int8")
    >>> error = packing_error(block, torch.randn(16, 768))[""]  # about 0.015
    """
    packed, errors = _packed(model), {}
    if must_run_as_written():
        raise ValueError("model must run without autocast, global hooks and transforms, which bypass packing")
    if not packed:
        raise ValueError(f"model must be packed, got a {type(model).__name__} that is not; call pack first")
    names = {module: name for name, module in model.named_modules()}

    def compare(module: nn.Module, args: tuple, keywords: dict, plain: Tensor) -> None:
        errors[names[module]] = _relative(packed[module].forward(*args, **keywords), plain)

    hooks = []
    try:
        with eval_mode(model):
            y = model(*inputs)
            if not isinstance(y, Tensor):
                raise TypeError(
                    f"model must return a tensor, got a {type(y).__name__}; "
                    "wrap the model in a module that returns one of its tensors"
                )
            hooks += [module.register_forward_hook(compare, with_kwargs=True) for module in packed]
            unpack(model)
            plain = model(*inputs)
    finally:
        _put_in_place(packed.values())
        for hook in hooks:
            hook.remove()
    return {"": _relative(y, plain)} | errors


def _relative(y: Tensor, plain: Tensor) -> float:
    error, norm = (y.double() - plain.double()).norm().item(), plain.double().norm().item()
    return error / norm if norm else math.inf if error else 0.0


def is_packed(module: nn.Module) -> bool:
    """Return whether this module's own forward reads packed weights; its children do not count."""
    return _packed_forward(module) is not None


def _packed_forward(module: nn.Module) -> PackedForward | None:
    owner = getattr(module.__dict__.get("forward"), "__self__", None)
    return owner if isinstance(owner, PackedForward) else None


def _packed(model: nn.Module) -> dict[nn.Module, PackedForward]:
    return {module: found for module in model.modules() if (found := _packed_forward(module)) is not None}


def _put_in_place(forwards: Iterable[PackedForward]) -> None:
    for forward in forwards:
        forward.module.forward = forward.forward


def _packable(model: nn.Module, kind: type[Packed]) -> Iterator[tuple[PackedForward, Tensors]]:
    """Yield the forwards that `pack` puts in place in an unpacked model, each with the tensors to copy.

    The Linears that a block or an attention reads go with it. A tied head reads the table of the Embedding
    that stands before it in the model.
    """
    table: Tensor | None = None
    with_parent: set[nn.Module | None] = set()
    for module in model.modules():
        if isinstance(module, Embedding):
            table = module.weight
        packed_forward = BY_FORWARD.get(type(module).forward)
        if packed_forward is None or "forward" in module.__dict__ or module in with_parent:
            continue
        forward = packed_forward(module, kind)
        tied = isinstance(module, Head) and module.weight is None
        tensors = forward.tensors(table if tied else None)
        fit = tensors is not None and forward.fit_together(tensors)
        if fit or isinstance(module, FeedForward):  # packed apart, they would take a block off the op
            with_parent.update(forward.linears())
        if not fit or tensors is None:
            continue
        sizes = [t.numel() for t in tensors if t is not None]
        if (sum(sizes) if forward.joined else max(sizes)) >= WORTH_PACKING:
            yield forward, tensors
