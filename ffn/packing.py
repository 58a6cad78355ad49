"""Packing: inference on the CPU from copies of the weights that oneDNN reads faster; see `ffn.ops.packed`.

A packed module keeps its parameters and children and gets a `forward` of its own, which looks at the weights
at each call and steps aside, to the forward of the class, whenever the copies would not do.
"""

from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from ffn.activations import TABLE
from ffn.nn.feed_forward import PROJECTIONS, FeedForward, plain_parameters
from ffn.nn.head import Head
from ffn.ops.feed_forward import fits
from ffn.ops.library import needs_textbook
from ffn.ops.packed import Packed, why_not

WORTH_PACKING = 1 << 18  # elements of a weight; below, a call costs more than the reading
M = TypeVar("M", bound=nn.Module)
Tensors = tuple[Tensor | None, ...]


def pack(model: M) -> M:
    """Run a model's inference on the CPU from packed weights, until `unpack`; returns the model.

    Served are its FeedForwards, Heads and other Linears that are plain and whose weight has 2**18 elements or
    more, in calls under `torch.no_grad` or `torch.inference_mode`. Whatever else is wanted runs as before:
    gradients, dropout, autocast, torch.compile, export, torch.func; and so does a block once a child of it is
    hooked, replaced or parametrized.

    The copies, as large as the weights, are made by the first call that wants them, and anew by the first one
    after a weight has changed or moved: state dicts, torch's optimizers, `.to()` and in-place operations are
    seen. Not seen is a write past torch's counter (through `weight.data`, numpy or another process) that
    leaves the first and the last 64 bytes of the weight alone: call `unpack` and `pack` after such a one.
    Copies are in no state dict; a deep copy and a pickle of the model are packed and make their own.

    Raises:
        ValueError: a weight that would be served is not float32 or bfloat16 on the CPU, oneDNN is missing, or
            there is nothing to serve.

    >>> block = pack(FeedForward(768, 3072)).eval()
    >>> with torch.no_grad():
    ...     y = block(torch.randn(16, 768))
    """
    found = [module for module, _ in _servable(model)]
    if not found and not any(map(is_packed, model.modules())):
        what = f"no plain FeedForward, Linear or Head of {WORTH_PACKING} weights or more in it"
        raise ValueError(f"pack({type(model).__name__}): nothing to serve, {what}; leave it unpacked")
    names = {module: f"{name}." if name else "" for name, module in model.named_modules()}
    for module in found:
        for name, weight in module.named_parameters(names[module].removesuffix(".")):
            reason = why_not(weight) if weight.ndim == 2 else None
            if reason is not None:
                raise ValueError(f"pack({type(model).__name__}): {name} is {reason}")
    pack_where_possible(model)
    return model


def unpack(model: M) -> M:
    """Undo `pack`: the forwards of the classes again, and no copies. Returns the model."""
    for module in filter(is_packed, model.modules()):
        del module.forward
    return model


def pack_where_possible(model: nn.Module) -> list[nn.Module]:
    """What `pack` does, refusing nothing; returns the modules that were not packed before."""
    found = list(_servable(model))
    for module, form in found:
        module.forward = form(module).forward
    return [module for module, _ in found]


_hooked: list = []  # once a process, with the first copies


def _watch_optimizers() -> None:
    if not _hooked:
        _hooked.append(register_optimizer_step_post_hook(_count_fused_writes))


def _count_fused_writes(optimizer: Optimizer, *_) -> None:
    """Count what torch's fused optimizers write without counting."""
    for group in optimizer.param_groups:
        if group.get("fused"):
            torch.autograd.graph.increment_version([p for p in group["params"] if p.grad is not None])


def is_packed(module: nn.Module) -> bool:
    return isinstance(getattr(module.__dict__.get("forward"), "__self__", None), _PackedForward)


def _servable(model: nn.Module) -> Iterator[tuple[nn.Module, "type[_PackedForward]"]]:
    """The modules to pack that are not yet, each with its form; the Linears of a block go with the block."""
    served: set[nn.Module | None] = set()
    for module in model.modules():
        if isinstance(module, FeedForward):
            children = [module._modules.get(name) for name in PROJECTIONS]
            if is_packed(module):
                served.update(children)
            elif _is_plain_block(module):
                served.update(children)
                if _is_worth_it(module.up_proj):
                    yield module, _PackedBlock
        elif module in served or "forward" in module.__dict__:
            continue
        elif type(module) is Head and module.dim * module.vocab_size >= WORTH_PACKING:
            yield module, _PackedHead
        elif _is_worth_it(module):
            yield module, _PackedLinear


def _is_plain_block(block: FeedForward) -> bool:
    if "forward" in block.__dict__ or type(block).forward is not FeedForward.forward or block.act is not None:
        return False
    return all(plain_parameters(child) is not None for child in block.children())


def _is_worth_it(linear: nn.Module) -> bool:
    found = plain_parameters(linear)
    return found is not None and found[0].numel() >= WORTH_PACKING


class _PackedForward:
    """Whose forward takes the place of a module's; keeps the copies of its weights."""

    def __init__(self, module: nn.Module):
        self.module = module
        self.packed: Packed | None = None

    def __getstate__(self) -> dict:
        return {"module": self.module, "packed": None}

    def forward(self, x: Tensor, *rest) -> Tensor:
        raise NotImplementedError

    def fits(self, x: Tensor, tensors: Tensors) -> bool:
        """Whether x and these tensors are plain and go together."""
        raise NotImplementedError

    def copies(self, x: Tensor, tensors: Tensors) -> Packed | None:
        """The copies of these tensors as they are now; None if they cannot be had or x does not fit."""
        packed = self.packed
        if packed is None or not packed.are_of(tensors):
            packed = self.packed = None  # before the new ones take memory
            if self.fits(x, tensors) and not any(t is not None and why_not(t) for t in tensors):
                _watch_optimizers()
                packed = self.packed = Packed(tensors)
        return packed if packed is not None and packed.fit(x) else None


def _is_more_than_numbers() -> bool:
    """Whether calls are to be compiled, differentiated, transformed, traced or cast."""
    return (
        torch.compiler.is_compiling()
        or torch.is_grad_enabled()
        or torch.is_autocast_enabled("cpu")
        or needs_textbook()
        or torch._C._get_tracing_state() is not None
    )


class _PackedBlock(_PackedForward):
    module: FeedForward

    def forward(self, x: Tensor) -> Tensor:
        packed = None if _is_more_than_numbers() else self.copies_for(x)
        if packed is None:
            return type(self.module).forward(self.module, x)
        activation, chunk = self.module.activation, self.module.chunk_tokens
        if chunk is None or x.numel() <= chunk * x.shape[-1]:
            return packed.feed_forward(x, activation)
        parts = x.reshape(-1, x.shape[-1]).split(chunk)
        return torch.cat([packed.feed_forward(part, activation) for part in parts]).view(*x.shape[:-1], -1)

    def copies_for(self, x: Tensor) -> Packed | None:
        """The copies, if the block as it is now leaves x to them."""
        block = self.module
        if block.backend not in ("auto", "eager") or (
            block.training and (block.dropout or block.out_dropout)
        ):
            return None
        weights = block._weights_or_reason(x)
        if isinstance(weights, str) or TABLE[block.activation].gated != (weights[2] is not None):
            return None
        return self.copies(x, weights)

    def fits(self, x: Tensor, tensors: Tensors) -> bool:
        return fits(TABLE[self.module.activation], x, *tensors)

    def explain(self, x: Tensor) -> str | None:
        """The line for `FeedForward.explain`; None where the block runs as if it were not packed."""
        if _is_more_than_numbers() or self.copies_for(x) is None:
            return None
        return "packed: products in oneDNN, from copies of the weights in its own layout"


class _PackedProduct(_PackedForward):
    def copies(self, x: Tensor, tensors: Tensors) -> Packed | None:
        return super().copies(x, tensors) if type(x) is Tensor else None

    def fits(self, x: Tensor, tensors: Tensors) -> bool:
        weight, bias = tensors
        if type(weight) is not nn.Parameter or weight.ndim != 2:
            return False
        if bias is None:
            return True
        return type(bias) is nn.Parameter and bias.shape == weight.shape[:1] and bias.dtype == weight.dtype


class _PackedLinear(_PackedProduct):
    module: nn.Linear

    def forward(self, x: Tensor) -> Tensor:
        linear, packed = self.module, None
        if type(linear) is nn.Linear and not _is_more_than_numbers():  # a parametrization changes the class
            packed = self.copies(x, (linear._parameters.get("weight"), linear._parameters.get("bias")))
        return type(linear).forward(linear, x) if packed is None else packed.linear(x)


class _PackedHead(_PackedProduct):
    module: Head

    def forward(self, hidden: Tensor, table: Tensor | None = None) -> Tensor:
        packed = None
        if not _is_more_than_numbers():
            packed = self.copies(hidden, (self.module._matrix(table), None))
        return Head.forward(self.module, hidden, table) if packed is None else packed.linear(hidden)
