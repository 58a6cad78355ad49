"""Forwards that take the place of a module's own and read copies of its weights; `ffn.pack` puts them there.

Each looks at the weights at each call and steps aside, to the forward of the class, whenever the copies would
not do.
"""

from contextlib import contextmanager
from threading import local

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook as has_global_hooks
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from ffn.activations import TABLE
from ffn.nn.attention import Attention, LayerCache
from ffn.nn.feed_forward import FeedForward
from ffn.nn.head import Head
from ffn.nn.loss import cap
from ffn.nn.plain import LINEAR_FORWARD, plain_parameters
from ffn.ops.arguments import fits
from ffn.ops.dense import Dense
from ffn.ops.torch_modes import needs_textbook
from ffn.packing.float_copies import Packed

Tensors = tuple[Tensor | None, ...]


def attention_projections(attention: Attention) -> list[nn.Module | None]:
    """What makes queries, keys and values."""
    return [attention._modules.get(name) for name in ("q_proj", "k_proj", "v_proj")]


class _Here(local):
    look: frozenset[nn.Module] | None = None  # this thread's


_here = _Here()


@contextmanager
def one_look(model: nn.Module):
    """Within, in this thread, weights and hooks of the model are looked at by a module's first call alone.

    For callers who let nobody else have a turn between the calls: in generation a tenth of the time.
    """
    before, _here.look = _here.look, frozenset(model.modules())
    try:
        yield
    finally:
        _here.look = before


class PackedForward:
    """Whose forward takes the place of a module's; keeps the copies of its weights."""

    joined = False  # whether its products have one copy between them

    def __init__(self, module: nn.Module, kind: type[Packed]):
        self.module, self.kind = module, kind
        self.packed: Packed | None = None
        self.look: frozenset[nn.Module] | None = None  # within which the copies were last found to do

    def turn_into(self, kind: type[Packed]) -> None:
        self.kind, self.packed, self.look = kind, None, None

    def __getstate__(self) -> dict:
        return {"module": self.module, "kind": self.kind, "packed": None, "look": None}

    def forward(self, x: Tensor, *rest) -> Tensor:
        raise NotImplementedError

    def fits(self, x: Tensor, tensors: Tensors) -> bool:
        """Whether x and these tensors are plain and go together."""
        raise NotImplementedError

    def copies_for(self, x: Tensor) -> Packed | None:
        """The copies, if the module as it is now leaves x to them."""
        raise NotImplementedError

    def serving(self, x: Tensor) -> Packed | None:
        """`copies_for(x)` or, where one look is enough and that has given copies within it, these."""
        if _is_more_than_numbers():
            return None
        packed, look = self.packed, _here.look
        if packed is not None and look is not None and look is self.look and packed.fit(x):
            return packed
        packed = self.copies_for(x)
        self.look = look if packed is not None and look is not None and self.module in look else None
        return packed

    def copies(self, x: Tensor, tensors: Tensors) -> Packed | None:
        """The copies of these tensors as they are now; None if they cannot be had or x does not fit."""
        packed = self.packed
        if packed is None or not packed.are_of(tensors):
            packed = self.packed = None  # before the new ones take memory
            if self.fits(x, tensors) and not any(t is not None and self.kind.why_not(t) for t in tensors):
                _watch_optimizers()
                packed = self.packed = self.kind(tensors, self.joined)
        return packed if packed is not None and packed.fit(x) else None


def _is_more_than_numbers() -> bool:
    """Whether calls are to be compiled, differentiated, transformed, traced or cast."""
    return (
        torch.compiler.is_compiling()
        or torch.is_grad_enabled()
        or torch.is_autocast_enabled("cpu")
        or needs_textbook()
    )


class PackedBlock(PackedForward):
    """A FeedForward's, chunk by chunk where the block says so."""

    module: FeedForward

    def forward(self, x: Tensor) -> Tensor:
        packed = self.serving(x)
        if packed is None:
            return type(self.module).forward(self.module, x)
        activation, chunk = self.module.activation, self.module.chunk_tokens
        if chunk is None or x.numel() <= chunk * x.shape[-1]:
            return packed.feed_forward(x, activation)
        parts = x.reshape(-1, x.shape[-1]).split(chunk)
        return torch.cat([packed.feed_forward(part, activation) for part in parts]).view(*x.shape[:-1], -1)

    def copies_for(self, x: Tensor) -> Packed | None:
        block = self.module
        if block.backend not in ("auto", "eager") or (
            block.training and (block.dropout or block.out_dropout)
        ):
            return None
        products = block.products(x)
        if products is None or TABLE[block.activation].gated != (products[2] is not None):
            return None
        up, down, gate = (Dense(None, None) if q is None else q for q in products)
        if not all(type(q) is Dense for q in (up, down, gate)):
            return None
        return self.copies(x, (up.weight, down.weight, gate.weight, up.bias, down.bias, gate.bias))

    def fits(self, x: Tensor, tensors: Tensors) -> bool:
        up, down, gate, up_bias, down_bias, gate_bias = tensors
        products = (
            Dense(up, up_bias),
            Dense(down, down_bias),
            None if gate is None else Dense(gate, gate_bias),
        )
        return fits(TABLE[self.module.activation], x, products)

    def explain(self, x: Tensor) -> str | None:
        """The line for `FeedForward.explain`; None where the block runs as if it were not packed."""
        if _is_more_than_numbers() or self.copies_for(x) is None:
            return None
        return f"packed: {self.kind.what}"


class PackedProduct(PackedForward):
    """What Linears, heads and attentions share: weights with a bias or without, multiplied and no more."""

    def copies(self, x: Tensor, tensors: Tensors) -> Packed | None:
        return super().copies(x, tensors) if type(x) is Tensor else None

    def fits(self, x: Tensor, tensors: Tensors) -> bool:
        weight, bias = tensors
        if type(weight) is not nn.Parameter or weight.ndim != 2:
            return False
        if bias is None:
            return True
        return type(bias) is nn.Parameter and bias.shape == weight.shape[:1] and bias.dtype == weight.dtype


class PackedLinear(PackedProduct):
    """A Linear's."""

    module: nn.Linear

    def forward(self, input: Tensor) -> Tensor:
        packed = self.serving(input)
        return type(self.module).forward(self.module, input) if packed is None else packed.linear(input)

    def copies_for(self, x: Tensor) -> Packed | None:
        linear = self.module
        if type(linear) is not nn.Linear or nn.Linear.forward is not LINEAR_FORWARD:  # or parametrized
            return None
        return self.copies(x, (linear._parameters.get("weight"), linear._parameters.get("bias")))


class PackedAttention(PackedProduct):
    """One product for queries, keys and values; what comes behind is the module's own."""

    module: Attention
    joined = True

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        packed = self.serving(x)
        if packed is None:
            return type(self.module).forward(self.module, x, rotary, mask, cache)
        return self.module.mix(packed.linear(x).split(packed.heights, -1), rotary, mask, cache)

    def copies_for(self, x: Tensor) -> Packed | None:
        found = [pair for linear in attention_projections(self.module) if (pair := plain_parameters(linear))]
        if len(found) < 3 or has_global_hooks():
            return None
        weights, biases = zip(*found, strict=True)
        return self.copies(x, weights + biases)

    def fits(self, x: Tensor, tensors: Tensors) -> bool:
        weights, biases = tensors[:3], tensors[3:]
        kinds = {(t.dtype, t.shape[1:]) for t in weights if t is not None}
        return (
            len(kinds) == 1
            and len({bias is None for bias in biases}) == 1
            and all(super(PackedAttention, self).fits(x, pair) for pair in zip(weights, biases, strict=True))
        )


class PackedHead(PackedProduct):
    """The product alone: what comes before and behind it is the module's own. A tied head's table comes with
    the call, so there is no first look that would do for all."""

    module: Head

    def forward(self, hidden: Tensor, table: Tensor | None = None) -> Tensor:
        head = self.module
        if _is_more_than_numbers():
            return Head.forward(head, hidden, table)
        hidden = head.transformed(hidden)
        packed = self.copies(hidden, (head._matrix(table), head.bias))
        if packed is None:
            return cap(F.linear(hidden, head._matrix(table), head.bias), head.softcap)
        return cap(packed.linear(hidden), head.softcap)


_hooked: list = []  # once a process, with the first copies


def _watch_optimizers() -> None:
    if not _hooked:
        _hooked.append(register_optimizer_step_post_hook(_count_fused_writes))


def _count_fused_writes(optimizer: Optimizer, *_) -> None:
    """Count what torch's fused optimizers write without counting."""
    for group in optimizer.param_groups:
        if group.get("fused"):
            torch.autograd.graph.increment_version([p for p in group["params"] if p.grad is not None])
