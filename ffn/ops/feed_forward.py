"""The op: check, choose, call."""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ffn import activations
from ffn.activations import Activation
from ffn.ops import compiled, dispatch, reference, rule
from ffn.ops.arguments import check_options, explain_misfit, fits, named
from ffn.ops.dense import Dense
from ffn.ops.dropout_mask import draw_seed
from ffn.ops.torch_modes import autocasts, needs_textbook

TRANSFORMS = "torch.func, forward-mode differentiation, torch.jit.trace or torch.export"


class Options(NamedTuple):
    """How the block runs; see `feed_forward`."""

    activation: str | Activation
    p: float
    save: str
    chunk_tokens: int | None
    backend: str


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
        activation: a row of `ffn.activations.TABLE`; gate must be given if, and only if, the row is gated.
        dropout: probability to drop a hidden value; met to within 2**-17. Default 0.
        save: what is saved for backward, per token. "preact": x and the preactivations, D + H elements when
            plain and D + 2H when gated. "input": x alone, D; backward repeats the first product.
        chunk_tokens: with save="input", the tokens computed at a time, so that no (N, H) tensor exists.
        backend: "auto", "eager" (torch ops), "triton" (kernels, on NVIDIA GPUs, or an error) or "reference"
            (the textbook under plain autograd, which runs second derivatives for every backend).

    Returns:
        (..., O), in x's dtype (autocast's where it is on).

    Raises:
        ValueError: shapes, devices, or options that do not fit together. TypeError: other dtypes, no tensors.

    Sources: Vaswani et al. 2017 (3.3); Shazeer 2020 for the gated forms.
    """
    products = Dense(up, up_bias), Dense(down, down_bias), _optional(gate, gate_bias)
    return call(x, products, Options(activation, dropout, save, chunk_tokens, backend))


def _optional(weight: Tensor | None, bias: Tensor | None) -> Dense | None:
    return None if weight is None and bias is None else Dense(weight, bias)  # pyright: ignore[reportArgumentType]


def call(x: Tensor, products: tuple, options: Options) -> Tensor:
    """`feed_forward` over products: up, down and gate, the last None when plain."""
    x, products, row, choice = _prepare(x, products, options)
    if choice.backend == "reference" or row.formula is None or needs_textbook():
        if options.backend == "triton":
            raise ValueError(f"backend must be 'auto' under {TRANSFORMS}; got 'triton'")
        hidden = *x.shape[:-1], products[0].weight.shape[0]
        factors = F.dropout(x.new_ones(hidden), options.p) if options.p > 0.0 else None
        return reference.feed_forward(x, *products, activation=row, noise=factors)
    flat = x.ndim == 2
    rows = x if flat else x.reshape(-1, x.shape[-1])
    products = tuple(None if q is None else q.with_seed() for q in products)
    seed = draw_seed(x.device) if options.p > 0.0 else None
    options = options._replace(activation=row.name)
    if choice.backend == "compiled":
        y = compiled.feed_forward(rows, products, seed, options)
    else:
        y = rule.feed_forward(rows, products, seed, options, choice.backend)
    return y if flat else y.view(*x.shape[:-1], y.shape[-1])


def explain(x: Tensor, products: tuple, options: Options) -> dispatch.Choice:
    """The choice of `call` for these inputs; raises what that would raise."""
    _, _, _, choice = _prepare(x, products, options)
    if needs_textbook():
        if options.backend == "triton":
            raise ValueError(f"backend must be 'auto' under {TRANSFORMS}; got 'triton'")
        return dispatch.Choice("reference", f"{TRANSFORMS} is on")
    return choice


def _prepare(x: Tensor, products: tuple, options: Options) -> tuple:
    """(x and products as autocast wants them, row, choice), once all fits together."""
    try:
        cast = autocasts(x)
        if cast:  # the weights too, when x comes from another layer and has been cast already
            dtype = torch.get_autocast_dtype(x.device.type)
            x, products = x.to(dtype), tuple(None if q is None else q.autocast(dtype) for q in products)
        row, choice = _check(options, x)
        fit = fits(row, x, products, cast)
    except AttributeError:
        named(x, products)  # raises for what is no tensor
        raise
    if not fit:
        explain_misfit(row, x, products)
    return x, products, row, choice


def _check(options: Options, x: Tensor) -> tuple[Activation, dispatch.Choice]:
    if type(options.activation) is str and not torch.compiler.is_compiling():
        try:
            return _known(*options, x.device, x.dtype)
        except TypeError:  # an option that cannot be hashed
            pass
    return _checked(*options, x.device, x.dtype)


def _checked(activation, p, save, chunk_tokens, backend, device, dtype):
    row = activations.resolve(activation)
    check_options(row, p, save, chunk_tokens, backend)
    return row, dispatch.choose(backend, device, dtype)


_known = lru_cache(256, typed=True)(_checked)  # the same options are checked once; 8.0 is not 8
