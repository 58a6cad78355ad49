"""The block with adapters: products of low rank beside frozen weights, under one autograd rule.

A product with a weight W (out, in) may gain factors A (r, in) and B (out, r): z = x W^T + s drop(x) A^T B^T.
Backward needs what the block needs without them, x and the preactivations, and rebuilds the rest. It never
forms the gradient of a frozen weight, nor W + s B A, and keeps no copy of a weight that autocast casts:

    u = dz B        dA = s u^T drop(x)        dB = s dz^T (drop(x) A^T)        dx = dz W + s drop(u A)
"""

from collections.abc import Sequence
from contextlib import nullcontext
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ffn import activations
from ffn.activations import Activation
from ffn.ops import dispatch, eager
from ffn.ops.dropout import dropped, noise
from ffn.ops.dropout_mask import draw_seed
from ffn.ops.library import autocasts, autograd_gradients, is_last_reader, wants_autograd


class Factors(NamedTuple):
    """What a product gains: scale drop(x) a^T b^T, of a (r, in) and b (out, r)."""

    a: Tensor
    b: Tensor
    scale: float
    dropout: float


class Options(NamedTuple):
    """What the rule must know besides tensors; of up, down and gate the factors' scales and dropouts."""

    activation: str
    p: float
    save: str
    chunk_tokens: int | None
    scales: tuple[float, ...]
    dropouts: tuple[float, ...]
    backend: str  # of what lies between the products


def adapted_feed_forward(
    x: Tensor,
    weights: Sequence[Tensor | None],
    factors: Sequence[Factors | None],
    *,
    activation: str,
    dropout: float = 0.0,
    save: str = "preact",
    chunk_tokens: int | None = None,
) -> Tensor:
    """`feed_forward` with adapters, which alone learn: the weights get no gradient. Products are torch's.

    Args:
        x: (..., D). weights: up, down, gate, up_bias, down_bias, gate_bias; known to fit, see `feed_forward`.
        factors: of up, down and gate; None for a product without an adapter.
        activation: the name of a row with a formula.
        dropout, save, chunk_tokens: as of `feed_forward`, and the same tensors are kept for backward.

    Returns:
        (..., O), in x's dtype (autocast's where it is on).

    Source: Hu et al. 2021 for the factors.
    """
    if autocasts(x):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    scales = tuple(0.0 if f is None else f.scale for f in factors)
    dropouts = tuple(0.0 if f is None else f.dropout for f in factors)
    backend = dispatch.choose("auto", x.device, x.dtype).backend
    options = Options(activation, dropout, save, chunk_tokens, scales, dropouts, backend)
    drops = dropout > 0.0 or any(dropouts)
    seeds = torch.cat([draw_seed(x.device) for _ in range(4)]) if drops else None
    pairs = [t for f in factors for t in ((None, None) if f is None else (f.a, f.b))]
    rows = x.reshape(-1, x.shape[-1])
    with torch.autocast(x.device.type, enabled=False):
        y = AdaptedRule.apply(rows, seeds, options, *weights, *pairs)
    return y.view(*x.shape[:-1], y.shape[-1])


class AdaptedRule(torch.autograd.Function):
    """The rule over tokens x (N, D); `adapted_feed_forward` explains the rest."""

    @staticmethod
    def forward(ctx, x, seeds, options, *tensors):
        ctx.options = options
        up, down, gate = _products(x, seeds, options, tensors)
        hidden, ys, kept = _hidden(seeds, options), [], (None, None)
        for rows in _chunks(x, options):
            pre, pre_gate = up.forward(x[rows], rows.start), gate and gate.forward(x[rows], rows.start)
            h = _passes(options).activate(pre, pre_gate, *hidden, rows.start)
            ys.append(down.forward(h, rows.start))
            kept = (pre, pre_gate) if options.save == "preact" else kept
        ctx.save_for_backward(x, seeds, *tensors, *kept)
        return ys[0] if len(ys) == 1 else torch.cat(ys)

    @staticmethod
    def backward(ctx, *grads):
        (dy,) = grads
        x, seeds, *tensors, pre, pre_gate = ctx.saved_tensors
        arguments = dy, x, seeds, ctx.options, tensors, ctx.needs_input_grad
        with torch.autocast(dy.device.type, enabled=False):
            if wants_autograd(dy):
                return _textbook_backward(*arguments)
            return _backward(*arguments, pre, pre_gate)


class Product(NamedTuple):
    """x weight^T + bias + scale drop(x) a^T b^T, and back; all in x's dtype."""

    weight: Tensor
    bias: Tensor | None
    a: Tensor | None
    b: Tensor | None
    scale: float
    p: float
    seed: Tensor | None
    onednn: bool

    def forward(self, x: Tensor, start: int) -> Tensor:
        """x (N, in) -> (N, out); `start` is the first token's row in the mask of the dropout."""
        y = eager.linear(x, self.weight, self.bias, self.onednn)
        if self.a is None or self.b is None:
            return y
        return y.addmm_(self._dropped(x, start) @ self.a.t(), self.b.t(), alpha=self.scale)

    def input_gradient(self, dz: Tensor, start: int, out: Tensor | None = None) -> Tensor:
        """dx (N, in) of dz (N, out), added to `out` where that is given."""
        dx = eager.product(dz, self.weight, out=out, add=out is not None)
        if self.a is None or self.b is None:
            return dx
        if not self.p:
            return dx.addmm_(dz @ self.b, self.a, alpha=self.scale)
        return dx.add_(self._dropped(dz @ self.b @ self.a, start), alpha=self.scale)

    def factor_gradients(self, dz: Tensor, x: Tensor, start: int) -> tuple[Tensor | None, Tensor | None]:
        """(da, db) of dz (N, out) and x (N, in)."""
        if self.a is None or self.b is None:
            return None, None
        x = self._dropped(x, start)
        da = torch.mm((dz @ self.b).t(), x).mul_(self.scale)
        return da, torch.mm(dz.t(), x @ self.a.t()).mul_(self.scale)

    def _dropped(self, x: Tensor, start: int) -> Tensor:
        if not self.p or self.seed is None:
            return x
        return dropped(x, self.seed, self.p, start)


def _products(x, seeds, options: Options, tensors) -> tuple[Product, Product, Product | None]:
    """Up, down and gate; None for the gate of a plain block."""
    cast: list = [None if t is None else t.to(x.dtype) for t in tensors]
    weights, biases, a, b = cast[:3], cast[3:6], cast[6::2], cast[7::2]
    onednn = dispatch.choose("eager", x.device, x.dtype).onednn
    each: list = [None] * 3 if seeds is None else list(seeds[1:].split(1))

    def product(i: int) -> Product:
        return Product(
            weights[i], biases[i], a[i], b[i], options.scales[i], options.dropouts[i], each[i], onednn
        )

    return product(0), product(1), None if weights[2] is None else product(2)


def _passes(options: Options) -> ModuleType:
    """The backend of what lies between the products: in backward the one that forward took."""
    return dispatch.MODULES[options.backend]


def _hidden(seeds: Tensor | None, options: Options) -> tuple[Activation, Tensor | None, float]:
    """What turns preactivations into hidden values, and back: the activation, the dropout's seed and p."""
    seed = seeds[:1] if seeds is not None and options.p else None
    return activations.TABLE[options.activation], seed, options.p


def _chunks(x: Tensor, options: Options) -> list[slice]:
    tokens = max(x.shape[0], 1)
    step = options.chunk_tokens or tokens
    return [slice(i, i + step) for i in range(0, tokens, step)]


def _backward(dy, x, seeds, options: Options, tensors, needs, pre, pre_gate):
    """What backward returns, a chunk of tokens at a time."""
    up, down, gate = _products(x, seeds, options, tensors)
    hidden, parts = _hidden(seeds, options), []
    reuse = options.save != "preact" or is_last_reader()
    in_onednn = dispatch.choose("eager", x.device, x.dtype).float32_in_onednn
    with eager.float32_in_onednn() if in_onednn else nullcontext():
        for rows in _chunks(x, options):
            dy_c, x_c, start = dy[rows], x[rows], rows.start
            if options.save != "preact":
                pre, pre_gate = up.forward(x_c, start), gate and gate.forward(x_c, start)
            dh = down.input_gradient(dy_c, start)
            dpre, dpre_gate, h = _passes(options).dactivate_(dh, pre, pre_gate, *hidden, start, reuse)
            dup, ddown = up.factor_gradients(dpre, x_c, start), down.factor_gradients(dy_c, h, start)
            dgate = None, None
            dx = up.input_gradient(dpre, start) if needs[0] else None
            if gate is not None and dpre_gate is not None:
                dgate = gate.factor_gradients(dpre_gate, x_c, start)
                dx = None if dx is None else gate.input_gradient(dpre_gate, start, out=dx)
            parts.append([dx, *dup, *ddown, *dgate])
    dx, *dfactors = zip(*parts, strict=True)
    dx = torch.cat(dx) if needs[0] else None
    return dx, *(None,) * 8, *(_sum(d, t) for d, t in zip(dfactors, tensors[6:], strict=True))


def _sum(parts: tuple[Tensor | None, ...], like: Tensor | None) -> Tensor | None:
    """The sum of the chunks' parts in the dtype of `like`, rounded once."""
    if like is None or parts[0] is None:
        return None
    if len(parts) == 1:
        return parts[0].to(like.dtype)
    wide = torch.float32 if parts[0].dtype.itemsize == 2 else parts[0].dtype
    return torch.stack([part.to(wide) for part in parts if part is not None]).sum(0).to(like.dtype)


def _textbook_backward(dy, x, seeds, options: Options, tensors, needs):
    """The same gradients through plain torch ops."""
    row, seed, p = _hidden(seeds, options)

    def through(product: Product, x: Tensor) -> Tensor:
        y = F.linear(x, product.weight, product.bias)
        if product.a is None or product.b is None:
            return y
        x = x if product.seed is None else x * noise(product.seed, len(x), x.shape[1], product.p, x.dtype)
        return y + product.scale * F.linear(F.linear(x, product.a), product.b)

    def block(x: Tensor, *tensors: Tensor | None) -> Tensor:
        up, down, gate = _products(x, seeds, options, tensors)
        pre = through(up, x)
        h = row(pre) if gate is None else row(through(gate, x)) * pre
        return through(
            down, h if seed is None else h * _passes(options).noise(seed, len(h), h.shape[1], p, h.dtype)
        )

    dx, *rest = autograd_gradients(block, (x, *tensors), (needs[0], *needs[3:]), dy)
    return dx, None, None, *rest
