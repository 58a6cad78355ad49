"""The autograd rule of the block, written once for all products and backends.

Backward reads x, the weights and the preactivations, and recomputes the rest: h takes one elementwise pass
over the preactivations, and the dropout mask is a function of a seed. With h = between(up x, gate x) and
y = down h:

    dh    = dy down            ddown = dy^T h
    dpre  = dh * act'(pre)     dup   = dpre^T x         dx = dpre up

A product (`ffn.ops.dense`, `ffn.ops.lora`) computes the matmuls and their gradients. A backend
(`ffn.ops.eager`, `ffn.ops.kernels.backend`) computes the elementwise passes between the products.
"""

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ffn import activations
from ffn.ops import dispatch, reference
from ffn.ops.between import Between, Needs
from ffn.ops.dense import Dense
from ffn.ops.matmul import float32_in_onednn, repays_onednn
from ffn.ops.options import Options
from ffn.ops.torch_modes import autocasts, autograd_gradients, is_last_reader, wants_autograd

BIAS = 1  # index of the bias among a product's tensors
NOTHING = (None,) * 4  # gradients of seed, options, kinds and cast


def feed_forward(x: Tensor, products: tuple, seed: Tensor | None, options: Options) -> Tensor:
    """Return y (N, O) for tokens x (N, D).

    Args:
        products: up, down and gate; gate is None when plain.
        seed: (1,) int64, of the dropout between the products; None without dropout.
        options: with the name of an activation in the table, and backend "eager" or "triton".
    """
    up, down, gate = products
    dense = type(up) is type(down) is Dense and (gate is None or type(gate) is Dense)
    if not dense:
        up, down, gate = (None if q is None else q.with_seed() for q in products)
    if dense and not torch.is_grad_enabled():
        return _forward(options, x, seed, products, False)[0]
    cast = None if dense and not autocasts(x) else x.dtype  # LoRA's factors may have a dtype of their own
    given: list[Any] = [up, down] if gate is None else [up, down, gate]
    kinds = [(type(q), q[q.TENSORS :]) for q in given]
    tensors = [t for q in given for t in q[: q.TENSORS]]
    if not torch.is_grad_enabled():
        return _forward(options, x, seed, _products(kinds, cast, tensors), False)[0]
    return Rule.apply(x, seed, options, kinds, cast, *tensors)


class Rule(torch.autograd.Function):
    """The rule for tokens x (N, D); see `feed_forward`.

    Args:
        kinds: per product, its class and the constants that follow its tensors.
        cast: the dtype to cast the tensors to; None if they have x's. They are saved uncast, and cast again
            in backward.
        tensors: those of up, down and gate, one product after the other.
    """

    @staticmethod
    def forward(ctx, x, seed, options, kinds, cast, *tensors):
        ctx.options, ctx.kinds, ctx.cast = options, kinds, cast
        products = _products(kinds, cast, tensors)
        y, pre, pre_gate = _forward(options, x, seed, products, options.save == "preact")
        ctx.save_for_backward(x, seed, *tensors, pre, pre_gate)
        return y

    @staticmethod
    def backward(ctx, *grads):
        (dy,) = grads
        if not autocasts(dy):
            return _gradients(ctx, dy)
        with torch.autocast(dy.device.type, enabled=False):  # compute in the dtypes of forward
            return _gradients(ctx, dy)


def _gradients(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
    """Return the results of backward, by the rule or, if `wants_autograd`, by the reference formula."""
    x, seed, *tensors, pre, pre_gate = ctx.saved_tensors
    if wants_autograd(dy):
        return _reference_backward(ctx, dy, x, seed, tensors)
    products = _products(ctx.kinds, ctx.cast, tensors)
    arguments = ctx.options, ctx.needs_input_grad, dy, x, seed, products, pre, pre_gate
    if repays_onednn(x, products[0].weight):
        with float32_in_onednn():
            dx, gradients = _backward(*arguments)
    else:
        dx, gradients = _backward(*arguments)
    if ctx.cast is not None:
        pairs = zip(gradients, tensors, strict=True)
        gradients = [g if g is None or g.dtype == t.dtype else g.to(t.dtype) for g, t in pairs]
    return dx, *NOTHING, *gradients


def _products(kinds: list, cast: torch.dtype | None, tensors) -> tuple[Any, Any, Any]:
    """Return (up, down, gate) rebuilt from their tensors; gate is None when plain."""
    if cast is not None:
        tensors = [
            t if t is None or t.dtype == cast or not t.is_floating_point() else t.to(cast) for t in tensors
        ]
    products: list[Any] = [None, None, None]
    start = 0
    for i, (make, constants) in enumerate(kinds):
        end = start + make.TENSORS
        products[i] = make(*tensors[start:end], *constants)
        start = end
    return tuple(products)


def _between(options: Options, seed: Tensor | None, row_start: int = 0) -> Between:
    return Between(activations.TABLE[options.activation], seed, options.p, row_start)


def _chunks(tokens: int, step: int | None) -> list[slice]:
    if step is None:
        return [slice(0, tokens)]
    return [slice(i, min(i + step, tokens)) for i in range(0, max(tokens, 1), step)]


def _forward(options: Options, x: Tensor, seed: Tensor | None, products, keep: bool):
    """Return (y, pre, pre_gate) for tokens x (N, D); the preactivations are None unless `keep`."""
    backend = dispatch.module(options.backend)
    if options.chunk_tokens is None:
        up, down, gate = products
        h, pre, pre_gate = forward_to_hidden(backend, x, up, gate, _between(options, seed), keep)
        return down.forward(h), pre, pre_gate
    ys = []
    for rows in _chunks(x.shape[0], options.chunk_tokens):
        chunk: list[Any] = [None if q is None else q.at(rows.start) for q in products]
        up, down, gate = chunk
        between = _between(options, seed, rows.start)
        ys.append(down.forward(forward_to_hidden(backend, x[rows], up, gate, between, False)[0]))
    return torch.cat(ys), None, None


def forward_to_hidden(backend: ModuleType, x: Tensor, up, gate, between: Between, keep: bool):
    """Return (h, pre, pre_gate); the preactivations are None unless `keep`.

    The backend fuses product and pass, or they run one after the other.
    """
    fused = backend.linear_act(x, up, gate, between, keep)
    if fused is not None:
        return fused
    pre, pre_gate = up.forward(x), None if gate is None else gate.forward(x)
    h = backend.act(pre, pre_gate, between)
    return (h, pre, pre_gate) if keep else (h, None, None)


def _backward(options: Options, needs, dy, x, seed, products, pre, pre_gate):
    """Return (dx, gradients of the products' tensors), computed one chunk of tokens at a time."""
    asked = _Asked.of(needs, products)
    reuse = options.save == "input" or is_last_reader()
    if options.chunk_tokens is None:
        saved = x, pre, pre_gate, _between(options, seed)
        return _backward_chunk(options, asked, dy, saved, products, reuse)
    dx = torch.empty_like(x) if asked.x else None
    wide = torch.float32 if x.dtype.itemsize == 2 else torch.float64  # one rounding for any number of chunks
    sums: list[Tensor | None] = []
    for rows in _chunks(x.shape[0], options.chunk_tokens):
        chunk = [None if q is None else q.at(rows.start) for q in products]
        saved = x[rows], None, None, _between(options, seed, rows.start)
        dx_c, parts = _backward_chunk(options, asked, dy[rows], saved, chunk, reuse)
        if dx is not None and dx_c is not None:
            dx[rows] = dx_c
        sums = sums or [None] * len(parts)
        for k, part in enumerate(parts):
            if part is not None:
                total = sums[k]
                sums[k] = part.to(wide) if total is None else total.add_(part)
    return dx, sums


class _Asked(NamedTuple):
    """True for each gradient that is needed: of x, and of the tensors of each product."""

    x: bool
    up: tuple[bool, ...]
    down: tuple[bool, ...]
    gate: tuple[bool, ...]

    @classmethod
    def of(cls, needs: tuple[bool, ...], products) -> "_Asked":
        first = 1 + len(NOTHING)
        second = first + products[0].TENSORS
        third = second + products[1].TENSORS
        return cls(needs[0], needs[first:second], needs[second:third], needs[third:])


def _backward_chunk(options: Options, asked: _Asked, dy: Tensor, saved: tuple, products, reuse: bool):
    """Return (dx, gradients of the products' tensors) for one chunk of tokens x (N, D)."""
    x, pre, pre_gate, between = saved
    up, down, gate = products
    backend = dispatch.module(options.backend)
    nothing = [None] * len(asked.gate)
    into_hidden = asked.x or any(asked.up) or any(asked.gate)
    needs_h = down.needs_input(asked.down)
    if options.save == "input" and (into_hidden or needs_h):
        pre, pre_gate = up.forward(x), None if gate is None else gate.forward(x)
    if not into_hidden:
        h = backend.act(pre, pre_gate, between) if needs_h else None
        return None, [*[None] * len(asked.up), *down.gradients(dy, h, asked.down), *nothing]
    needs = Needs(needs_h, asked.up[BIAS], bool(asked.gate) and asked.gate[BIAS])
    back = back_to_preactivations(backend, dy, down, asked.down, (pre, pre_gate, between), needs, reuse)
    dpre, dpre_gate, ddown, *sums = back
    dup = up.gradients(dpre, x, asked.up, sums[0])
    dx = up.input_gradient(dpre) if asked.x else None
    if gate is None:
        return dx, [*dup, *ddown]
    dgate = gate.gradients(dpre_gate, x, asked.gate, sums[1])
    if dx is not None:
        dx = gate.input_gradient(dpre_gate, out=dx, add=True)
    return dx, [*dup, *ddown, *dgate]


def back_to_preactivations(backend: ModuleType, dy: Tensor, down, asked, saved, needs: Needs, reuse: bool):
    """Return (dpre, dpre_gate, ddown, dup_bias, dgate_bias).

    The backend fuses product and pass, or they run one after the other.
    """
    pre, pre_gate, between = saved
    fused = backend.linear_dact(dy, down, asked, pre, pre_gate, between, needs, reuse)
    if fused is not None:
        return fused
    dpre, dpre_gate, h, *sums = backend.dact_(down.input_gradient(dy), pre, pre_gate, between, needs, reuse)
    return dpre, dpre_gate, down.gradients(dy, h, asked), *sums


def _reference_backward(ctx, dy, x, seed, tensors):
    """Return the results of `_gradients`, computed by autograd from the reference formula."""
    options = ctx.options
    factors = None
    if seed is not None:
        hidden = x.shape[0], _products(ctx.kinds, None, tensors)[0].weight.shape[0]
        factors = dispatch.module(options.backend).noise(seed, *hidden, options.p, x.dtype)

    def formula(x: Tensor, *tensors: Tensor | None) -> Tensor:
        up, down, gate = _products(ctx.kinds, ctx.cast, tensors)
        row = activations.TABLE[options.activation]
        return reference.feed_forward(x, up, down, gate, activation=row, noise=factors)

    need_x, *needs = ctx.needs_input_grad
    dx, *gradients = autograd_gradients(formula, (x, *tensors), (need_x, *needs[len(NOTHING) :]), dy)
    return dx, *NOTHING, *gradients
