"""Forwards that read packed copies of a module's weights; `ffn.pack` puts them in place of the module's own.

Each call compares the weights with the copied ones. A weight that has changed is copied anew. Where copies
cannot serve a call (gradients, autocast, a hooked child, ...), the forward of the module's class runs.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook as has_global_hooks

from ffn.activations import TABLE
from ffn.nn.attention import Attention, LayerCache
from ffn.nn.feed_forward import FeedForward
from ffn.nn.head import Head
from ffn.nn.loss import cap
from ffn.nn.plain import LINEAR_FORWARD, plain_parameters
from ffn.ops.arguments import fits
from ffn.ops.torch_modes import needs_reference
from ffn.packing.float_copies import Packed, Tensors


def must_run_as_written() -> bool:
    """Return whether calls are compiled, differentiated, transformed, traced, cast or hooked globally."""
    return (
        torch.compiler.is_compiling()
        or torch.is_grad_enabled()
        or torch.is_autocast_enabled("cpu")
        or bool(has_global_hooks())
        or needs_reference()
    )


def plain_tensors(linears: list[nn.Module | None]) -> Tensors | None:
    """Return the Linears' weights and then their biases; None if calling one does more than F.linear."""
    pairs = [pair for linear in linears if (pair := plain_parameters(linear)) is not None]
    if len(pairs) < len(linears):
        return None
    weights, biases = zip(*pairs, strict=True)
    return weights + biases


def plain_pair(weight: Tensor | None, bias: Tensor | None) -> Tensors | None:
    """Return (weight, bias) if the weight is a plain Parameter, and the bias is one or None."""
    plain = type(weight) is nn.Parameter and (bias is None or type(bias) is nn.Parameter)
    return (weight, bias) if plain else None


class PackedForward:
    """Base class: replaces a module's forward with one that reads packed copies of its weights.

    Args:
        module: the module to serve.
        kind: the class of the copies.
    """

    children: tuple[str, ...] = ()  # the Linears that the forward reads instead of calling them
    joined = False  # whether the copy is one weight made of all

    def __init__(self, module: nn.Module, kind: type[Packed]):
        self.module, self.kind = module, kind
        self.packed: Packed | None = None

    def __getstate__(self) -> dict:
        """Leave the copies out of deep copies and pickles, which make their own at their first call."""
        return {**self.__dict__, "packed": None}

    def forward(self, x: Tensor, *rest) -> Tensor:
        raise NotImplementedError

    def tensors(self, table: Tensor | None = None) -> Tensors | None:
        """Return the weights and then the biases that the module reads now; None if its class must run.

        table: the token table that a call brings to a tied head.
        """
        raise NotImplementedError

    def fit_together(self, tensors: Tensors) -> bool:
        """Return whether the shapes and dtypes of a plain weight (out, in) and its bias go together."""
        weight, bias = tensors
        if weight is None or weight.ndim != 2:
            return False
        return bias is None or (bias.shape == weight.shape[:1] and bias.dtype == weight.dtype)

    def linears(self) -> list[nn.Module | None]:
        """Return the children that the forward reads."""
        return [self.module._modules.get(name) for name in self.children]

    def copy(self, tensors: Tensors) -> Packed | None:
        """Copy these tensors and keep the copies; None if they cannot be packed."""
        self.packed = None  # before the new copies take memory
        if self.fit_together(tensors) and not any(t is not None and self.kind.why_not(t) for t in tensors):
            self.packed = self.kind(tensors, self.joined)
        return self.packed

    def serving(self, x: Tensor, table: Tensor | None = None) -> Packed | None:
        """Return the copies of the weights as they are now; None if x must go to the class's own forward."""
        if must_run_as_written() or type(x) is not Tensor:
            return None
        tensors, packed = self.tensors(table), self.packed
        if tensors is None:
            return None
        if packed is None or not packed.are_of(tensors):
            packed = self.copy(tensors)
        return packed if packed is not None and packed.fit(x) else None


class PackedBlock(PackedForward):
    """The forward of a FeedForward, chunk by chunk where the block says so."""

    module: FeedForward
    children = "up_proj", "down_proj", "gate_proj"

    def forward(self, x: Tensor) -> Tensor:
        packed = self.serving(x)
        if packed is None:
            return type(self.module).forward(self.module, x)
        activation, chunk = self.module.activation, self.module.chunk_tokens
        if chunk is None or x.numel() <= chunk * x.shape[-1]:
            return packed.feed_forward(x, activation)
        parts = x.reshape(-1, x.shape[-1]).split(chunk)
        return torch.cat([packed.feed_forward(part, activation) for part in parts]).view(*x.shape[:-1], -1)

    def serving(self, x: Tensor, table: Tensor | None = None) -> Packed | None:
        block = self.module
        drops = block.training and (block.dropout or block.out_dropout)
        return None if drops or block.backend not in ("auto", "eager") else super().serving(x)

    def tensors(self, table: Tensor | None = None) -> Tensors | None:
        up, down, gate = self.linears()
        if self.module.act is not None or TABLE[self.module.activation].gated != (gate is not None):
            return None
        if gate is not None:
            return plain_tensors([up, down, gate])
        tensors = plain_tensors([up, down])
        return None if tensors is None else (*tensors[:2], None, *tensors[2:], None)

    def fit_together(self, tensors: Tensors) -> bool:
        up, down, gate, up_bias, down_bias, gate_bias = tensors
        products = (up, up_bias), (down, down_bias), None if gate is None else (gate, gate_bias)
        # up stands for an input: it has the width, dtype and device of one
        return up is not None and fits(TABLE[self.module.activation], up, products)

    def explain(self, x: Tensor) -> str | None:
        """Return the line of `FeedForward.explain`; None if the block runs as if it were not packed."""
        return None if self.serving(x) is None else f"packed: {self.kind.what}"


class PackedLinear(PackedForward):
    """The forward of a Linear."""

    module: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        packed = self.serving(input)
        return type(self.module).forward(self.module, input) if packed is None else packed.linear(input)

    def tensors(self, table: Tensor | None = None) -> Tensors | None:
        linear = self.module
        if type(linear) is not nn.Linear or nn.Linear.forward is not LINEAR_FORWARD:  # or parametrized
            return None
        return plain_pair(linear._parameters.get("weight"), linear._parameters.get("bias"))


class PackedHead(PackedForward):
    """The forward of a Head with its matmul from packed copies. A tied head's table comes with each call."""

    module: Head

    def forward(self, hidden: Tensor, table: Tensor | None = None) -> Tensor:
        head = self.module
        hidden = head.transformed(hidden)
        packed = self.serving(hidden, table)
        if packed is None:
            return cap(F.linear(hidden, head._matrix(table), head.bias), head.softcap)
        return cap(packed.linear(hidden), head.softcap)

    def tensors(self, table: Tensor | None = None) -> Tensors | None:
        own = self.module.weight
        if (own is None) == (table is None):  # too many matrices or none, which the class refuses
            return None
        return plain_pair(own if table is None else table, self.module.bias)


class PackedAttention(PackedForward):
    """The forward of an Attention with one matmul for queries, keys and values."""

    module: Attention
    children = "q_proj", "k_proj", "v_proj"
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

    def tensors(self, table: Tensor | None = None) -> Tensors | None:
        return plain_tensors(self.linears())

    def fit_together(self, tensors: Tensors) -> bool:
        weights, biases = tensors[:3], tensors[3:]
        kinds = {(t.dtype, t.shape[1:]) for t in weights if t is not None}
        uniform = len(kinds) == 1 == len({bias is None for bias in biases})
        return uniform and all(map(super().fit_together, zip(weights, biases, strict=True)))
