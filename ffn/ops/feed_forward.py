"""The op: check the arguments, choose a backend, call it."""

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from ffn import activations
from ffn.activations import Activation
from ffn.ops import compiled, dispatch, reference, rule
from ffn.ops.arguments import check_options, explain_misfit, fits, named
from ffn.ops.dense import Dense
from ffn.ops.dropout_mask import draw_seed
from ffn.ops.options import Options
from ffn.ops.torch_modes import autocasts, needs_reference

TRANSFORMS = "torch.func, forward-mode differentiation, torch.jit.trace or torch.export"


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
    """Return down(drop(act(up x))), or down(drop(act(gate x) * up x)) when gated.

    Args:
        x: (..., D), float64, float32, bfloat16 or float16; any strides, any leading shape, zero tokens too.
        up, gate: (H, D). down: (O, H). up_bias, gate_bias: (H). down_bias: (O). All have x's dtype and
            device; under autocast all are cast to its dtype.
        activation: a name in `ffn.activations.TABLE`, or a callable, which runs under plain autograd.
            Default "gelu". gate must be given if, and only if, the activation is gated.
        dropout: probability to drop a hidden value, applied to within 2**-17. Default 0.
        save: the tensors saved for backward. "preact" (default): x and the preactivations, D + H elements per
            token when plain, D + 2H when gated. "input": x alone, D per token; backward repeats the first
            product.
        chunk_tokens: with save="input", compute this many tokens at a time, so that no (N, H) tensor exists.
            Under torch.compile each count of tokens then has a graph of its own.
            Default None: all at once.
        backend: "auto" (default), "eager" (torch ops), "triton" (kernels for NVIDIA GPUs; raises where they
            cannot run) or "reference" (the reference formula under plain autograd). With every backend,
            second derivatives run the reference formula.

    Returns:
        (..., O), in x's dtype, or in autocast's dtype where that is on.

    Raises:
        ValueError: shapes, devices or options do not fit together.
        TypeError: dtypes differ, or an argument is not a tensor.

    Sources: Vaswani et al. 2017 (3.3); Shazeer 2020 for the gated forms.
    """
    gated = None if gate is None and gate_bias is None else Dense(gate, gate_bias)  # pyright: ignore[reportArgumentType]
    products = Dense(up, up_bias), Dense(down, down_bias), gated
    return call(x, products, Options(activation, dropout, save, chunk_tokens, backend))


def call(x: Tensor, products: tuple, options: Options) -> Tensor:
    """Run `feed_forward` over products (up, down, gate); gate is None when plain."""
    x, products, row, resolved, _ = _prepare(x, products, options)
    if resolved.backend == "reference":
        hidden = *x.shape[:-1], products[0].weight.shape[0]
        factors = F.dropout(x.new_ones(hidden), options.p) if options.p > 0.0 else None
        return reference.feed_forward(x, *products, activation=row, noise=factors)
    flat = x.ndim == 2
    rows = x if flat else x.reshape(-1, x.shape[-1])
    seed = draw_seed(x.device) if options.p > 0.0 else None
    run = compiled.feed_forward if resolved.backend == "compiled" else rule.feed_forward
    y = run(rows, products, seed, resolved)
    return y if flat else y.view(*x.shape[:-1], y.shape[-1])


def explain(x: Tensor, products: tuple, options: Options) -> dispatch.Choice:
    """Return the backend that `call` would choose; raise what `call` would raise before it computes."""
    return _prepare(x, products, options)[-1]


def _prepare(x: Tensor, products: tuple, options: Options) -> tuple:
    """Check all arguments; return (x, products, row, resolved options, choice).

    x and products are cast if autocast is on. Resolved options name the activation's row and the backend that
    runs.
    """
    try:
        cast = autocasts(x)
        if cast:  # also casts weights when x already has autocast's dtype, from another layer
            dtype = torch.get_autocast_dtype(x.device.type)
            x, products = x.to(dtype), tuple(None if q is None else q.autocast(dtype) for q in products)
        row, resolved, choice = _check(*options, x.device, x.dtype)
        fit = fits(row, x, products, cast)
    except AttributeError:
        named(x, products)  # raises if one is not a tensor
        raise
    if not fit:
        explain_misfit(row, x, products)
    if needs_reference():
        if options.backend == "triton":
            raise ValueError(f"backend must be 'auto' under {TRANSFORMS}, got 'triton'")
        choice = dispatch.Choice("reference", f"{TRANSFORMS} is on")
        resolved = resolved._replace(backend="reference")
    return x, products, row, resolved, choice


def _check(activation, *others) -> tuple[Activation, Options, dispatch.Choice]:
    if type(activation) is str and not torch.compiler.is_compiling():
        try:
            return _known(activation, *others)
        except TypeError:  # an option that cannot be hashed
            pass
    return _checked(activation, *others)


def _checked(activation, p, save, chunk_tokens, backend, device, dtype):
    """Check the options; return (row, resolved options, choice)."""
    row = activations.resolve(activation)
    check_options(row, p, save, chunk_tokens, backend)
    if row.formula is None:
        choice = dispatch.Choice("reference", f"{row.name} is not in the table of activations")
    else:
        choice = dispatch.choose(backend, device, dtype)
    return row, Options(row.name, p, save, chunk_tokens, choice.backend), choice


_known = lru_cache(256, typed=True)(_checked)  # checks equal options once; typed, or 8.0 would pass as 8
