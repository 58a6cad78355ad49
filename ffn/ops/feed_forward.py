"""The op: check, choose, call; and the autograd rule, once, over any backend.

Backward needs x, the weights and the preactivations, and rebuilds the rest: h is one cheap pass over the
preactivations, the dropout mask a function of a seed. With h = act(pre) of width H and y = h down^T:

    dh    = dy down            ddown = dy^T h
    dpre  = dh * act'(pre)     dup   = dpre^T x         dx = dpre up
"""

from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ffn import activations
from ffn.activations import Activation
from ffn.ops import dispatch, reference
from ffn.ops.arguments import check_options, explain_misfit, fits, named
from ffn.ops.dropout_mask import draw_seed
from ffn.ops.eager import float32_in_onednn, product, repays_onednn, weight_gradient
from ffn.ops.library import (
    autocasts,
    autograd_gradients,
    cast,
    is_last_reader,
    needs_textbook,
    wants_autograd,
)

TRANSFORMS = "torch.func, forward-mode differentiation, torch.jit.trace or torch.export"


class Options(NamedTuple):
    """What the rule must know besides tensors and backend."""

    activation: str
    p: float
    save: str
    chunk_tokens: int | None


def feed_forward(
    x: Tensor,
    up: Tensor,
    down: Tensor,
    gate: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    gate_bias: Tensor | None = None,
    *,
    activation: str | Activation = "gelu",
    dropout: float = 0.0,
    save: str = "preact",
    chunk_tokens: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """The feed-forward block: down(drop(act(up x))), or down(drop(act(gate x) * up x)) when gated.

    Args:
        x: (..., D), float64, float32, bfloat16 or float16; any strides, any leading shape, zero tokens too.
        up, gate: (H, D). down: (O, H). up_bias, gate_bias: (H). down_bias: (O). All of x's dtype and device,
            unless autocast is on, which casts them all.
        activation: a row of `ffn.activations.TABLE`; gate is wanted when, and only when, the row is gated.
        dropout: probability to drop a hidden value; met to within 2**-17.
        save: what is kept for backward, a token. "preact": x and the preactivations, D + H elements when
            plain and D + 2H when gated. "input": x alone, D; backward repeats the first product.
        chunk_tokens: with save="input", so many tokens at a time, so that no (N, H) tensor exists at all.
        backend: "auto", "eager" (torch ops), "triton" (kernels, on NVIDIA GPUs, or an error) or "reference"
            (the textbook under plain autograd, which second derivatives take from each).

    Returns:
        (..., O), in x's dtype (autocast's where it is on).

    Raises:
        ValueError: shapes, devices, or options that do not fit together. TypeError: other dtypes, no tensors.

    Sources: Vaswani et al. 2017 (3.3); Shazeer 2020 for the gated forms.
    """
    try:
        if autocasts(x):  # the weights too, when x comes from another layer and has been cast already
            given = cast(x, up, down, gate, up_bias, down_bias, gate_bias)
            x, up, down, gate, up_bias, down_bias, gate_bias = given
        check = _known if type(activation) is str and not torch.compiler.is_compiling() else _checked
        row, options, choice = check(activation, dropout, save, chunk_tokens, backend, x.device, x.dtype)
        fit = fits(row, x, up, down, gate, up_bias, down_bias, gate_bias)
    except (AttributeError, TypeError):  # what is no tensor, or an option that cannot be hashed
        named(x, up, down, gate, up_bias, down_bias, gate_bias)
        row, options, choice = _checked(activation, dropout, save, chunk_tokens, backend, x.device, x.dtype)
        fit = fits(row, x, up, down, gate, up_bias, down_bias, gate_bias)
    if not fit:
        explain_misfit(row, x, up, down, gate, up_bias, down_bias, gate_bias)
    if choice.backend == "reference" or row.formula is None or needs_textbook():
        if backend == "triton":
            raise ValueError(f"backend='triton' does not run under {TRANSFORMS}; use 'auto'")
        factors = F.dropout(x.new_ones(*x.shape[:-1], up.shape[0]), dropout) if dropout > 0.0 else None
        weights = (up, down, gate, up_bias, down_bias, gate_bias)
        return reference.feed_forward(x, *weights, activation=row, noise=factors)
    flat = x.ndim == 2
    rows = x if flat else x.reshape(-1, x.shape[-1])
    seed = draw_seed(x.device) if dropout > 0.0 else None
    if torch.is_grad_enabled():
        y = FeedForwardRule.apply(rows, seed, up, down, gate, up_bias, down_bias, gate_bias, options, choice)
    else:
        forward = _forward if chunk_tokens is None else _forward_by_chunks
        y, _, _ = forward(options, choice, rows, seed, (up, down, gate, up_bias, down_bias, gate_bias), False)
    return y if flat else y.view(*x.shape[:-1], y.shape[-1])


def explain(x: Tensor, weights, activation, dropout, save, chunk_tokens, backend) -> dispatch.Choice:
    """What `feed_forward` would choose for these inputs; raises what it would raise."""
    if autocasts(x):
        x, *weights = cast(x, *weights)
    row, _, choice = _checked(activation, dropout, save, chunk_tokens, backend, x.device, x.dtype)
    if not fits(row, x, *weights):
        explain_misfit(row, x, *weights)
    if needs_textbook():
        if backend == "triton":
            raise ValueError(f"backend='triton' does not run under {TRANSFORMS}; use 'auto'")
        return dispatch.Choice("reference", f"{TRANSFORMS} is on")
    return choice


def _checked(activation, p, save, chunk_tokens, backend, device, dtype):
    row = activations.resolve(activation)
    check_options(row, p, save, chunk_tokens, backend)
    return row, Options(row.name, p, save, chunk_tokens), dispatch.choose(backend, device, dtype)


_known = lru_cache(256, typed=True)(_checked)  # the same options are checked once; 8.0 is not 8


def _chunks(tokens: int, step: int) -> list[slice]:
    return [slice(i, min(i + step, tokens)) for i in range(0, max(tokens, 1), step)]


def _forward(options, choice, x, seed, weights, keep: bool, row_start: int = 0):
    """(y, pre, pre_gate) of tokens x (N, D), which begin at row_start of the dropout mask."""
    up, down, gate, up_bias, down_bias, gate_bias = weights
    backend, row = dispatch.MODULES[choice.backend], activations.TABLE[options.activation]
    h, pre, pre_gate = backend.linear_act(
        x, up, up_bias, gate, gate_bias, row, seed, options.p, row_start, choice.onednn, keep
    )
    return backend.linear(h, down, down_bias, choice.onednn), pre, pre_gate


def _forward_by_chunks(options, choice, x, seed, weights, keep: bool):
    """(y, None, None), a chunk of tokens at a time."""
    ys = []
    for rows in _chunks(x.shape[0], options.chunk_tokens):
        y, _, _ = _forward(options, choice, x[rows], seed, weights, keep, rows.start)
        ys.append(y)
    return torch.cat(ys), None, None


class FeedForwardRule(torch.autograd.Function):
    """The rule over tokens x (N, D); `feed_forward` explains the rest."""

    @staticmethod
    def forward(ctx, x, seed, up, down, gate, up_bias, down_bias, gate_bias, options, choice):
        ctx.options, ctx.choice = options, choice
        weights = (up, down, gate, up_bias, down_bias, gate_bias)
        forward = _forward if options.chunk_tokens is None else _forward_by_chunks
        keep = options.save == "preact"
        y, pre, pre_gate = forward(options, choice, x, seed, weights, keep)
        if not keep:
            pre = pre_gate = None
        ctx.save_for_backward(x, seed, *weights, pre, pre_gate)
        return y

    @staticmethod
    def backward(ctx, *grads):
        (dy,) = grads
        if not autocasts(dy):
            return _gradients(ctx, dy)
        with torch.autocast(dy.device.type, enabled=False):  # wherever it is called: forward's dtypes
            return _gradients(ctx, dy)


def _gradients(ctx, dy):
    """What backward returns: by the rule or, where that will not do, by the textbook."""
    x, seed, *weights, pre, pre_gate = ctx.saved_tensors
    if wants_autograd(dy):
        return *_textbook_backward(ctx, dy, x, seed, weights), None, None
    options, choice = ctx.options, ctx.choice
    backward = _backward if options.chunk_tokens is None else _backward_by_chunks
    arguments = options, choice, ctx.needs_input_grad, dy, x, seed, weights, pre, pre_gate
    if not (choice.float32_in_onednn and repays_onednn(x, weights[0])):
        return *backward(*arguments), None, None
    with float32_in_onednn():
        return *backward(*arguments), None, None


def _backward_by_chunks(options, choice, needs, dy, x, seed, weights, pre, pre_gate):
    """What `_backward` gives, a chunk of tokens at a time; no preactivations were kept."""
    assert pre is None
    assert pre_gate is None
    dx = torch.empty_like(x) if needs[0] else None
    wide = torch.float32 if x.dtype.itemsize == 2 else torch.float64  # however many the parts, one rounding
    sums: list[Tensor | None] = [None] * len(weights)
    for rows in _chunks(x.shape[0], options.chunk_tokens):
        dx_c, _, *parts = _backward(
            options, choice, needs, dy[rows], x[rows], seed, weights, None, None, rows.start
        )
        if dx is not None and dx_c is not None:
            dx[rows] = dx_c
        for k, (total, part) in enumerate(zip(sums, parts, strict=True)):
            if part is not None:
                sums[k] = part.to(wide) if total is None else total.add_(part)
    return dx, None, *(None if total is None else total.to(x.dtype) for total in sums)


def _backward(options, choice, needs, dy, x, seed, weights, pre, pre_gate, row_start: int = 0):
    """The gradients of (x, seed, *weights) that are asked for, over tokens x (N, D)."""
    up, down, gate, up_bias, _, gate_bias = weights
    need_x, _, need_up, need_down, need_gate, need_up_bias, need_down_bias, need_gate_bias, _, _ = needs
    backend, row = dispatch.MODULES[choice.backend], activations.TABLE[options.activation]
    dx = dup = ddown = dgate = dup_bias = dgate_bias = None
    reuse = options.save == "input" or is_last_reader()
    into_hidden = need_x or need_up or need_gate or need_up_bias or need_gate_bias
    if options.save == "input" and (into_hidden or need_down):
        pre, pre_gate = backend.linear_pre(x, up, up_bias, gate, gate_bias, choice.onednn, after=dy)
    if into_hidden:
        dpre, dpre_gate, ddown, dup_bias, dgate_bias = backend.linear_dact(
            *(dy, down, pre, pre_gate, row, seed, options.p, row_start),
            *(need_down, need_up_bias, need_gate_bias, reuse),
        )
        dup = weight_gradient(dpre, x, up) if need_up else None
        dx = product(dpre, up) if need_x else None
        if dpre_gate is not None:
            dx = product(dpre_gate, gate, out=dx, add=True) if dx is not None else None
            dgate = weight_gradient(dpre_gate, x, gate) if need_gate else None
    elif need_down:
        ddown = weight_gradient(dy, backend.activate(pre, pre_gate, row, seed, options.p, row_start), down)
    ddown_bias = dy.sum(0) if need_down_bias else None
    return dx, None, dup, ddown, dgate, dup_bias, ddown_bias, dgate_bias


def _textbook_backward(ctx, dy, x, seed, weights):
    """The same gradients through the textbook."""
    options, noise = ctx.options, dispatch.MODULES[ctx.choice.backend].noise
    row, hidden = activations.TABLE[options.activation], (x.shape[0], weights[0].shape[0])
    factors = None if seed is None else noise(seed, *hidden, options.p, x.dtype)
    formula = partial(reference.feed_forward, activation=row, noise=factors)
    need_x, _, *needs = ctx.needs_input_grad[:-2]
    dx, *dweights = autograd_gradients(formula, (x, *weights), (need_x, *needs), dy)
    return dx, None, *dweights
