"""The derivative of the block, written once, over products and a backend's passes.

Backward needs x, the weights and the preactivations, and rebuilds the rest: h is one cheap pass over the
preactivations, the dropout mask a function of a seed. With h = between(up x, gate x) and y = down h:

    dh    = dy down            ddown = dy^T h
    dpre  = dh * act'(pre)     dup   = dpre^T x         dx = dpre up

A product (`ffn.ops.dense`, `ffn.ops.lora`) goes forward and back; a backend (`ffn.ops.eager`,
`ffn.ops.kernels.backend`) makes the passes between the products.
"""

from contextlib import nullcontext
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ffn import activations
from ffn.ops import dispatch, reference
from ffn.ops.between import Between, Needs
from ffn.ops.matmul import float32_in_onednn, repays_onednn
from ffn.ops.torch_modes import autocasts, autograd_gradients, is_last_reader, wants_autograd

BIAS = 1  # the place of the bias among a product's tensors


class Call(NamedTuple):
    """What the rule must know besides tensors.

    products: of up, down and gate the class and the constants behind its tensors; None without a gate.
    """

    activation: str
    p: float
    save: str
    chunk_tokens: int | None
    backend: str
    products: tuple


def feed_forward(x: Tensor, products: tuple, seed: Tensor | None, options, backend: str) -> Tensor:
    """y (N, O) of tokens x (N, D) and the products up, down and gate (None when plain).

    seed: of the dropout between the products, None without it.
    """
    activation, p, save, chunk_tokens, _ = options
    split = tuple(None if q is None else (type(q), q[q.TENSORS :]) for q in products)
    call = Call(activation, p, save, chunk_tokens, backend, split)
    if torch.is_grad_enabled():
        tensors = [t for q in products if q is not None for t in q[: q.TENSORS]]
        return Rule.apply(x, seed, call, *tensors)
    y, _, _ = _forward(call, x, seed, products, keep=False)
    return y


class Rule(torch.autograd.Function):
    """The rule over tokens x (N, D); `feed_forward` explains the rest."""

    @staticmethod
    def forward(ctx, x, seed, call, *tensors):
        ctx.call = call
        products = _products(call, _cast(tensors, x.dtype))
        y, pre, pre_gate = _forward(call, x, seed, products, keep=call.save == "preact")
        ctx.save_for_backward(x, seed, *tensors, pre, pre_gate)
        return y

    @staticmethod
    def backward(ctx, *grads):
        (dy,) = grads
        x, seed, *tensors, pre, pre_gate = ctx.saved_tensors
        autocast = torch.autocast(dy.device.type, enabled=False) if autocasts(dy) else nullcontext()
        with autocast:  # forward's dtypes, wherever backward is called
            if wants_autograd(dy):
                return _textbook_backward(ctx, dy, x, seed, tensors)
            products = _products(ctx.call, _cast(tensors, x.dtype))
            fast = repays_onednn(x, products[0].weight)
            with float32_in_onednn() if fast else nullcontext():
                dx, gradients = _backward(
                    ctx.call, ctx.needs_input_grad, dy, x, seed, products, pre, pre_gate
                )
        gradients = [
            g if g is None or t is None else g.to(t.dtype) for g, t in zip(gradients, tensors, strict=True)
        ]
        return dx, None, None, *gradients


def _cast(tensors, dtype: torch.dtype) -> list:
    """The tensors in x's dtype: weights that autocast casts are saved as they are, and cast again."""
    return [t if t is None or t.dtype == dtype or not t.is_floating_point() else t.to(dtype) for t in tensors]


def _products(call: Call, tensors) -> tuple[Any, Any, Any]:
    """(up, down, gate) from their tensors, one product's after the other."""
    products, i = [], 0
    for split in call.products:
        if split is None:
            products.append(None)
            continue
        kind, constants = split
        products.append(kind(*tensors[i : i + kind.TENSORS], *constants))
        i += kind.TENSORS
    return tuple(products)


def _between(call: Call, seed: Tensor | None, row_start: int = 0) -> Between:
    return Between(activations.TABLE[call.activation], seed, call.p, row_start)


def _chunks(tokens: int, step: int | None) -> list[slice]:
    if step is None:
        return [slice(0, tokens)]
    return [slice(i, min(i + step, tokens)) for i in range(0, max(tokens, 1), step)]


def _forward(call: Call, x: Tensor, seed: Tensor | None, products, keep: bool):
    """(y, pre, pre_gate) of tokens x (N, D); the preactivations only if `keep`."""
    if call.chunk_tokens is None:
        return _forward_chunk(call, x, products, _between(call, seed), keep)
    ys = []
    for rows in _chunks(x.shape[0], call.chunk_tokens):
        chunk = [None if q is None else q.at(rows.start) for q in products]
        y, _, _ = _forward_chunk(call, x[rows], chunk, _between(call, seed, rows.start), keep)
        ys.append(y)
    return torch.cat(ys), None, None


def _forward_chunk(call: Call, x: Tensor, products, between: Between, keep: bool):
    """(y, pre, pre_gate): product, pass, product."""
    up, down, gate = products
    h, pre, pre_gate = forward_to_hidden(dispatch.module(call.backend), x, up, gate, between, keep)
    return down.forward(h), pre, pre_gate


def forward_to_hidden(backend: ModuleType, x: Tensor, up, gate, between: Between, keep: bool):
    """(h, pre, pre_gate), fused by the backend or one after the other; the last two only if `keep`."""
    fused = backend.linear_act(x, up, gate, between, keep)
    if fused is not None:
        return fused
    pre, pre_gate = up.forward(x), None if gate is None else gate.forward(x)
    h = backend.act(pre, pre_gate, between)
    return (h, pre, pre_gate) if keep else (h, None, None)


def _backward(call: Call, needs, dy, x, seed, products, pre, pre_gate):
    """(dx, the gradients of the products' tensors), a chunk of tokens at a time."""
    needs = _Asked.of(needs, products)
    reuse = call.save == "input" or is_last_reader()
    if call.chunk_tokens is None:
        saved = x, pre, pre_gate, _between(call, seed)
        return _backward_chunk(call, needs, dy, saved, products, reuse)
    dx = torch.empty_like(x) if needs.x else None
    wide = torch.float32 if x.dtype.itemsize == 2 else torch.float64  # one rounding, however many chunks
    sums: list[Tensor | None] = []
    for rows in _chunks(x.shape[0], call.chunk_tokens):
        chunk = [None if q is None else q.at(rows.start) for q in products]
        saved = x[rows], None, None, _between(call, seed, rows.start)
        dx_c, parts = _backward_chunk(call, needs, dy[rows], saved, chunk, reuse)
        if dx is not None and dx_c is not None:
            dx[rows] = dx_c
        sums = sums or [None] * len(parts)
        for k, part in enumerate(parts):
            if part is not None:
                total = sums[k]
                sums[k] = part.to(wide) if total is None else total.add_(part)
    return dx, sums


class _Asked(NamedTuple):
    """The gradients that are asked for: of x, and of the tensors of each product."""

    x: bool
    up: tuple[bool, ...]
    down: tuple[bool, ...]
    gate: tuple[bool, ...]

    @classmethod
    def of(cls, needs, products) -> "_Asked":
        need_x, _, _, *needs = needs
        parts, i = [], 0
        for q in products:
            n = 0 if q is None else q.TENSORS
            parts.append(tuple(needs[i : i + n]))
            i += n
        return cls(need_x, *parts)


def _backward_chunk(call: Call, asked: _Asked, dy: Tensor, saved: tuple, products, reuse: bool):
    """(dx, gradients) over tokens x (N, D): product back, pass back, product back."""
    x, pre, pre_gate, between = saved
    up, down, gate = products
    backend = dispatch.module(call.backend)
    nothing = [None] * len(asked.gate)
    into_hidden = asked.x or any(asked.up) or any(asked.gate)
    needs_h = any(need for k, need in enumerate(asked.down) if k != BIAS)
    if call.save == "input" and (into_hidden or needs_h):
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
    """(dpre, dpre_gate, ddown, dup_bias, dgate_bias), fused by the backend or one after the other."""
    pre, pre_gate, between = saved
    fused = backend.linear_dact(dy, down, asked, pre, pre_gate, between, needs, reuse)
    if fused is not None:
        return fused
    dpre, dpre_gate, h, *sums = backend.dact_(down.input_gradient(dy), pre, pre_gate, between, needs, reuse)
    return dpre, dpre_gate, down.gradients(dy, h, asked), *sums


def _textbook_backward(ctx, dy, x, seed, tensors):
    """The same gradients by the textbook and autograd."""
    call = ctx.call
    factors = None
    if seed is not None:
        hidden = x.shape[0], _products(call, tensors)[0].weight.shape[0]
        factors = dispatch.module(call.backend).noise(seed, *hidden, call.p, x.dtype)

    def formula(x: Tensor, *tensors: Tensor | None) -> Tensor:
        up, down, gate = _products(call, _cast(tensors, x.dtype))
        row = activations.TABLE[call.activation]
        return reference.feed_forward(x, up, down, gate, activation=row, noise=factors)

    need_x, _, _, *needs = ctx.needs_input_grad
    dx, *gradients = autograd_gradients(formula, (x, *tensors), (need_x, *needs), dy)
    return dx, None, None, *gradients
