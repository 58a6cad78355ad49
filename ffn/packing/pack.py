"""Packing: inference on the CPU from copies of the weights that oneDNN reads faster, as they are or in int8.

A packed module keeps its parameters and children and gets a `forward` of its own; see `ffn.packing.forwards`,
and `ffn.packing.float_copies` and `ffn.packing.int8_copies` for the copies.
"""

import math
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ffn.nn.attention import Attention
from ffn.nn.feed_forward import PROJECTIONS, FeedForward
from ffn.nn.head import Head
from ffn.nn.plain import plain_parameters
from ffn.packing.float_copies import Packed
from ffn.packing.forwards import (
    PackedAttention,
    PackedBlock,
    PackedForward,
    PackedHead,
    PackedLinear,
    attention_projections,
)
from ffn.packing.int8_copies import Quantized

WORTH_PACKING = 1 << 18  # elements of a weight; below, a call costs more than the reading
FORMS: dict[str, type[Packed]] = {"float": Packed, "int8": Quantized}
M = TypeVar("M", bound=nn.Module)


def pack(model: M, form: str = "float") -> M:
    """Run a model's inference on the CPU from packed weights, until `unpack`; returns the model.

    Args:
        form: "float", the weights as they are. "int8", for decoding: each row of a weight rounded to 255
            steps and each token as it comes, a fourth of the bytes to read for about 1% of error a product,
            which `packing_error` measures. The form of the last call holds.

    Served are its FeedForwards, Attentions, Heads and other Linears that are plain and whose weights have
    2**18 elements or more, in calls under `torch.no_grad` or `torch.inference_mode`. Whatever else is wanted
    runs as before: gradients, dropout, autocast, torch.compile, export, torch.func; and so does a block or an
    attention once a child of it is hooked, replaced or parametrized.

    The copies, as large as the weights (int8: two bytes each), are made by the first call that wants them,
    and anew by the first one after a weight has changed or moved: state dicts, torch's optimizers, `.to()`
    and in-place operations are seen. Not seen is a write past torch's counter (through `weight.data`, numpy,
    another process, or a fused optimizer whose step is compiled) that leaves the first and the last 64 bytes
    of the weight alone: call `unpack` and `pack` after such a one. `generate` looks once, at its first token.
    Copies are in no state dict; a deep copy and a pickle of the model are packed and make their own. A
    shallow copy goes on calling the original.

    Raises:
        TypeError: no torch module.
        ValueError: a weight that would be served is not float32 or bfloat16 on the CPU, oneDNN is missing or,
            for int8, the processor's instructions for it; no such form; or there is nothing to serve.

    >>> block = pack(FeedForward(768, 3072)).eval()
    >>> with torch.no_grad():
    ...     y = block(torch.randn(16, 768))
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"pack wants a torch module; got a {type(model).__name__}")
    if form not in FORMS:
        raise ValueError(f"pack(form={form!r}): no such form; choose one of {', '.join(FORMS)}")
    kind, packed = FORMS[form], _packed(model)
    found = [module for module, _ in _servable(model)]
    if not found and not packed:
        what = f"no plain FeedForward, Attention, Linear or Head of {WORTH_PACKING} weights or more in it"
        raise ValueError(f"pack({type(model).__name__}): nothing to serve, {what}; leave it unpacked")
    changing = [module for module in packed if packed[module].kind is not kind]
    names = {module: name for name, module in model.named_modules()}
    for module in found + changing:
        for name, weight in module.named_parameters(names[module]):
            reason = kind.why_not(weight) if weight.ndim == 2 else None
            if reason is not None:
                raise ValueError(f"pack({type(model).__name__}): {name} is {reason}")
    for module in changing:
        packed[module].turn_into(kind)
    pack_where_possible(model, kind)
    return model


def unpack(model: M) -> M:
    """Undo `pack`: the forwards of the classes again, and no copies. Returns the model."""
    for module in _packed(model):
        del module.forward
    return model


@torch.no_grad()
def packing_error(model: nn.Module, *inputs: Any) -> dict[str, float]:
    """What packing changes: ||packed - plain|| / ||plain|| of the outputs, by module; inf if only that is 0.

    Args:
        inputs: of the model, whose output is a tensor. It is in eval mode meanwhile.

    Returns:
        under "" that of the whole model, then that of each packed module on what it meets in the plain model.

    Raises:
        ValueError: nothing in the model is packed. TypeError: an output that is no tensor.

    >>> block = pack(FeedForward(768, 3072), "int8")
    >>> error = packing_error(block, torch.randn(16, 768))[""]  # some 0.015
    """
    packed, errors, name = _packed(model), {}, type(model).__name__
    if not packed:
        raise ValueError(f"packing_error({name}): nothing is packed; call pack first")
    names = {module: name for name, module in model.named_modules()}

    def compare(module: nn.Module, args: tuple, keywords: dict, plain: Tensor) -> None:
        errors[names[module]] = _relative(packed[module].forward(*args, **keywords), plain)

    training = [module for module in model.modules() if module.training]
    model.eval()
    hooks = []
    try:
        y = model(*inputs)
        if not isinstance(y, Tensor):
            raise TypeError(
                f"packing_error({name}) wants a tensor as output; got a {type(y).__name__}; "
                "wrap the model in a module that returns one of its tensors"
            )
        hooks += [module.register_forward_hook(compare, with_kwargs=True) for module in packed]
        unpack(model)
        plain = model(*inputs)
    finally:
        for module in training:
            module.training = True
        for module, owner in packed.items():
            module.forward = owner.forward
        for hook in hooks:
            hook.remove()
    return {"": _relative(y, plain)} | errors


def _relative(y: Tensor, plain: Tensor) -> float:
    off, norm = (y.double() - plain.double()).norm().item(), plain.double().norm().item()
    return off / norm if norm else math.inf if off else 0.0


def pack_where_possible(model: nn.Module, kind: type[Packed] = Packed) -> list[nn.Module]:
    """What `pack` does, refusing nothing; returns the modules that were not packed before."""
    found = list(_servable(model))
    for module, forward in found:
        module.forward = forward(module, kind).forward
    return [module for module, _ in found]


def is_packed(module: nn.Module) -> bool:
    """Whether this module's own forward reads packed weights; those of its children do not count."""
    return _owner(module) is not None


def _owner(module: nn.Module) -> PackedForward | None:
    owner = getattr(module.__dict__.get("forward"), "__self__", None)
    return owner if isinstance(owner, PackedForward) else None


def _packed(model: nn.Module) -> dict[nn.Module, PackedForward]:
    return {module: owner for module in model.modules() if (owner := _owner(module)) is not None}


def _servable(model: nn.Module) -> Iterator[tuple[nn.Module, type[PackedForward]]]:
    """The modules to pack that are not, each with its forward; the Linears of a block go with the block."""
    served: set[nn.Module | None] = set()
    for module in model.modules():
        if isinstance(module, FeedForward):
            children = [module._modules.get(name) for name in PROJECTIONS]
            if is_packed(module):
                served.update(children)
            elif _is_plain_block(module):
                served.update(children)
                if _is_worth_it(module.up_proj):
                    yield module, PackedBlock
        elif isinstance(module, Attention) and (is_packed(module) or _is_plain_attention(module)):
            served.update(attention_projections(module))
            if not is_packed(module):
                yield module, PackedAttention
        elif module in served or "forward" in module.__dict__:
            continue
        elif type(module) is Head and module.dim * module.vocab_size >= WORTH_PACKING:
            yield module, PackedHead
        elif _is_worth_it(module):
            yield module, PackedLinear


def _is_plain_block(block: FeedForward) -> bool:
    if "forward" in block.__dict__ or type(block).forward is not FeedForward.forward or block.act is not None:
        return False
    return all(plain_parameters(child) is not None for child in block.children())


def _is_plain_attention(attention: Attention) -> bool:
    """Whether its three products are worth one that is packed."""
    if "forward" in attention.__dict__ or type(attention).forward is not Attention.forward:
        return False
    found = [pair for linear in attention_projections(attention) if (pair := plain_parameters(linear))]
    if len(found) < 3 or len({bias is None for _, bias in found}) > 1:
        return False
    return sum(weight.numel() for weight, _ in found) >= WORTH_PACKING


def _is_worth_it(linear: nn.Module) -> bool:
    found = plain_parameters(linear)
    return found is not None and found[0].numel() >= WORTH_PACKING
