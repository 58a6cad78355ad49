"""The op: check, choose, call; and the autograd rule, once, over any backend.

Backward needs x, the weights and the preactivations, and rebuilds the rest: h is one cheap pass over the
preactivations, the dropout mask a function of a seed. With h = act(pre) of width H and y = h down^T:

    dh    = dy down            ddown = dy^T h
    dpre  = dh * act'(pre)     dup   = dpre^T x         dx = dpre up
"""

from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ffn import activations
from ffn.activations import Activation
from ffn.ops import dispatch, eager, library, reference
from ffn.ops.dropout import check_probability, draw_seed, noise

SAVES = ("preact", "input")


class Plan(NamedTuple):
    """What the rule must know besides tensors."""

    activation: str
    p: float
    save: str
    chunk_tokens: int | None
    choice: dispatch.Choice


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
        backend: "auto", "eager" or "reference" (the textbook under plain autograd).

    Returns:
        (..., O), in x's dtype (autocast's where it is on).

    Raises:
        ValueError: shapes, devices, or options that do not fit together. TypeError: dtypes that differ.

    Sources: Vaswani et al. 2017 (3.3); Shazeer 2020 for the gated forms.
    """
    row = activations.resolve(activation)
    check_options(row, dropout, save, chunk_tokens, backend)
    weights = (up, down, gate, up_bias, down_bias, gate_bias)
    if autocasts(x):  # the weights too, when x comes from another layer and has been cast already
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weights = x.to(dtype), tuple(None if t is None else t.to(dtype) for t in weights)
    if not _fits(row, x, *weights):
        _explain_misfit(row, x, *weights)
    choice = dispatch.choose(backend, x)
    if choice.backend == "reference" or row.formula is None or library.needs_textbook():
        hidden = (*x.shape[:-1], up.shape[0])
        factors = F.dropout(x.new_ones(hidden), dropout) if dropout > 0.0 else None
        return _textbook(row, factors, x, *weights)
    rows = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    seed = draw_seed(x.device) if dropout > 0.0 else None
    plan = Plan(row.name, dropout, save, chunk_tokens, choice)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *weights)):
        y = FeedForwardRule.apply(rows, seed, *weights, plan)
    else:
        y, _, _ = _forward(plan, rows, seed, *weights)
    return y if x.ndim == 2 else y.view(*x.shape[:-1], down.shape[0])


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on and casts x: torch leaves float64, integers and meta alone, and so do we."""
    if x.is_meta or x.dtype == torch.float64 or not x.is_floating_point():
        return False
    return torch.is_autocast_enabled(x.device.type)


def check_options(row: Activation, p: float, save: str, chunk_tokens: int | None, backend: str) -> None:
    """Raise ValueError for a probability, `save`, `chunk_tokens` or `backend` that make no sense."""
    check_probability("dropout", p)
    dispatch.check_backend(backend)
    if save not in SAVES:
        raise ValueError(f"save={save!r}: want one of {', '.join(SAVES)}")
    if chunk_tokens is not None and (save != "input" or chunk_tokens < 1):
        raise ValueError(f"chunk_tokens={chunk_tokens} with save={save!r}: want at least 1 and save='input'")
    if save != "preact" and (row.formula is None or backend == "reference"):
        what = "backend='reference'" if backend == "reference" else f"activation {row.name}"
        raise ValueError(
            f"save={save!r}: {what} runs under plain autograd, which keeps what it likes; leave save out"
        )


def _fits(row: Activation, x, up, down, gate, up_bias, down_bias, gate_bias) -> bool:
    """Whether shapes, dtypes and devices go together; asked at each call, so it is quick."""
    if up.ndim != 2 or down.ndim != 2 or x.ndim == 0 or row.gated != (gate is not None):
        return False
    H, D = up.shape
    if x.shape[-1] != D or down.shape[1] != H or not x.is_floating_point():
        return False
    if gate is not None and gate.shape != up.shape:
        return False
    for bias, width in ((up_bias, H), (down_bias, down.shape[0]), (gate_bias, H)):
        if bias is not None and (bias.ndim != 1 or bias.shape[0] != width):
            return False
    dtype, device = x.dtype, x.device
    given = (up, down, gate, up_bias, down_bias, gate_bias)
    return all(t is None or (t.dtype == dtype and t.device == device) for t in given)


def _explain_misfit(row: Activation, x, up, down, gate, up_bias, down_bias, gate_bias):
    """Raise one line: the rule, what came instead, and the remedy."""
    given = {"gate": gate, "up": up, "down": down}
    given |= {"gate_bias": gate_bias, "up_bias": up_bias, "down_bias": down_bias}
    given = {name: t for name, t in given.items() if t is not None}
    H, D = up.shape if up.ndim == 2 else ("H", "D")
    out = down.shape[0] if down.ndim == 2 else "O"
    want = {"gate": (H, D), "up": (H, D), "down": (out, H)}
    want |= {"gate_bias": (H,), "up_bias": (H,), "down_bias": (out,)}
    want = {name: shape for name, shape in want.items() if name in given and (name != "gate" or row.gated)}
    want |= {"gate": (H, D)} if row.gated else {}
    got = {"x": x, **given}
    fits = x.ndim > 0 and x.shape[-1] == D and want.keys() == given.keys()
    if not fits or any(tuple(given[name].shape) != shape for name, shape in want.items()):
        rule = ", ".join(f"{name} {_shape(shape)}" for name, shape in want.items())
        came = ", ".join(f"{name} {_shape(t.shape)}" for name, t in got.items())
        raise ValueError(f"feed_forward(activation={row.name!r}) wants x (..., {D}), {rule}; got {came}")
    if not x.is_floating_point() or any(t.dtype != x.dtype for t in given.values()):
        came = ", ".join(f"{name} {str(t.dtype)[6:]}" for name, t in got.items())
        raise TypeError(f"feed_forward wants one floating dtype; got {came}; cast by .to(dtype) or autocast")
    came = ", ".join(f"{name} {t.device}" for name, t in got.items())
    raise ValueError(f"feed_forward wants one device; got {came}; move one side with .to(device)")


def _shape(shape) -> str:
    return f"({', '.join(map(str, shape))})"


def _textbook(row, factors, x, up, down, gate, up_bias, down_bias, gate_bias) -> Tensor:
    weights = (up, down, gate, up_bias, down_bias, gate_bias)
    return reference.feed_forward(x, *weights, activation=row, noise=factors)


def _products(plan: Plan):
    return eager.float32_in_onednn() if plan.choice.float32_in_onednn else nullcontext()


def _chunks(plan: Plan, tokens: int) -> list[slice]:
    if plan.chunk_tokens is None:
        return [slice(0, tokens)]
    step = plan.chunk_tokens
    return [slice(i, min(i + step, tokens)) for i in range(0, max(tokens, 1), step)]


def _forward(plan: Plan, x, seed, up, down, gate, up_bias, down_bias, gate_bias):
    """(y, pre, pre_gate); the preactivations are those of the last chunk, the only one unless chunked."""
    row = activations.TABLE[plan.activation]
    ys, pre, pre_gate = [], None, None
    chunks = _chunks(plan, x.shape[0])
    for rows in chunks:
        pre, pre_gate = eager.linear_pre(
            x[rows] if len(chunks) > 1 else x, up, up_bias, gate, gate_bias, plan.choice.onednn
        )
        h = eager.activate(pre, pre_gate, row, seed, plan.p, rows.start)
        ys.append(eager.linear(h, down, down_bias, plan.choice.onednn))
    return (ys[0] if len(ys) == 1 else torch.cat(ys)), pre, pre_gate


class FeedForwardRule(torch.autograd.Function):
    """The rule over tokens x (N, D); `feed_forward` explains the rest."""

    @staticmethod
    def forward(ctx, x, seed, up, down, gate, up_bias, down_bias, gate_bias, plan: Plan):
        y, pre, pre_gate = _forward(plan, x, seed, up, down, gate, up_bias, down_bias, gate_bias)
        if plan.save == "input":
            pre = pre_gate = None
        ctx.save_for_backward(x, seed, up, down, gate, up_bias, down_bias, gate_bias, pre, pre_gate)
        ctx.plan = plan
        return y

    @staticmethod
    def backward(ctx, *grads):
        (dy,) = grads
        if not autocasts(dy):
            return _gradients(ctx, dy)
        with torch.autocast(dy.device.type, enabled=False):  # wherever it is called: forward's dtypes
            return _gradients(ctx, dy)


def _gradients(ctx, dy):
    """The gradients of (x, seed, *weights, plan), by the rule or, where that will not do, by the textbook."""
    x, seed, up, down, gate, up_bias, down_bias, gate_bias, pre, pre_gate = ctx.saved_tensors
    weights = (up, down, gate, up_bias, down_bias, gate_bias)
    create_graph = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    if create_graph or library.is_batched(dy):
        return _differentiable_backward(ctx, dy, x, seed, weights, create_graph)
    with _products(ctx.plan):
        return _backward(ctx.plan, ctx.needs_input_grad, dy, x, seed, weights, pre, pre_gate)


def _backward(plan: Plan, needs, dy, x, seed, weights, pre, pre_gate):
    """The gradients of (x, seed, *weights, plan), in chunks of tokens where the plan says so."""
    chunks = _chunks(plan, x.shape[0])
    if len(chunks) == 1:
        dx, *dweights = _backward_chunk(plan, needs, dy, x, seed, weights, pre, pre_gate, 0)
        return dx, None, *dweights, None
    dx = torch.empty_like(x) if needs[0] else None
    wide = torch.promote_types(x.dtype, torch.float32)  # many half-precision parts are summed in float32
    sums: list[Tensor | None] = [None] * len(weights)
    for rows in chunks:
        dx_c, *parts = _backward_chunk(plan, needs, dy[rows], x[rows], seed, weights, None, None, rows.start)
        if dx is not None and dx_c is not None:
            dx[rows] = dx_c
        for k, (total, part) in enumerate(zip(sums, parts, strict=True)):
            if part is not None:
                sums[k] = part.to(wide) if total is None else total.add_(part)
    return dx, None, *(None if total is None else total.to(x.dtype) for total in sums), None


def _backward_chunk(plan: Plan, needs, dy, x, seed, weights, pre, pre_gate, row_start: int):
    """The gradients of (x, *weights) that are asked for, over tokens x (N, D)."""
    up, down, gate, up_bias, _, gate_bias = weights
    need_x, _, need_up, need_down, need_gate, need_up_bias, need_down_bias, need_gate_bias, _ = needs
    row = activations.TABLE[plan.activation]
    dx = dup = ddown = dgate = dup_bias = dgate_bias = None
    into_hidden = need_x or need_up or need_gate or need_up_bias or need_gate_bias
    if plan.save == "input" and (into_hidden or need_down):
        x = eager.after(x, dy)
        pre, pre_gate = eager.linear_pre(x, up, up_bias, gate, gate_bias, plan.choice.onednn)
    if into_hidden:
        dpre, dpre_gate, ddown = eager.linear_dact(
            dy, down, pre, pre_gate, row, seed, plan.p, row_start, need_down
        )  # fmt: skip
        dx = dpre @ up if need_x else None
        dup = dpre.t() @ x if need_up else None
        dup_bias = dpre.sum(0) if need_up_bias else None
        if dpre_gate is not None:
            dx = dx.addmm_(dpre_gate, gate) if dx is not None else None
            dgate = dpre_gate.t() @ x if need_gate else None
            dgate_bias = dpre_gate.sum(0) if need_gate_bias else None
    elif need_down:
        ddown = dy.t() @ eager.activate(pre, pre_gate, row, seed, plan.p, row_start)
    ddown_bias = dy.sum(0) if need_down_bias else None
    return dx, dup, ddown, dgate, dup_bias, ddown_bias, dgate_bias


def _differentiable_backward(ctx, dy, x, seed, weights, create_graph: bool):
    """The same gradients through the textbook: they can be differentiated, and taken for many dy at once."""
    plan = ctx.plan
    needs = (ctx.needs_input_grad[0], *ctx.needs_input_grad[2:-1])
    with torch.enable_grad():
        inputs = [None if t is None else t.view_as(t) for t in (x, *weights)]  # cut from how they arose
        rows, up = inputs[:2]
        assert rows is not None
        assert up is not None
        factors = None if seed is None else noise(seed, rows.shape[0], up.shape[0], plan.p, rows.dtype)
        y = _textbook(activations.TABLE[plan.activation], factors, *inputs)
    wanted = [t for t, need in zip(inputs, needs, strict=True) if need and t is not None]
    found = iter(torch.autograd.grad(y, wanted, dy, create_graph=create_graph))
    dx, *dweights = (next(found) if need else None for need in needs)
    return dx, None, *dweights, None
