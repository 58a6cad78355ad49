"""The op: check, choose, call."""

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
from ffn.ops.torch_modes import autocasts, needs_textbook

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
    gated = None if gate is None and gate_bias is None else Dense(gate, gate_bias)  # pyright: ignore[reportArgumentType]
    products = Dense(up, up_bias), Dense(down, down_bias), gated
    return call(x, products, Options(activation, dropout, save, chunk_tokens, backend))


def call(x: Tensor, products: tuple, options: Options) -> Tensor:
    """`feed_forward` over products: up, down and gate, the last None when plain."""
    x, products, row, chosen, _ = _prepare(x, products, options)
    if chosen.backend == "reference" or row.formula is None or needs_textbook():
        if options.backend == "triton":
            raise ValueError(f"backend must be 'auto' under {TRANSFORMS}; got 'triton'")
        hidden = *x.shape[:-1], products[0].weight.shape[0]
        factors = F.dropout(x.new_ones(hidden), options.p) if options.p > 0.0 else None
        return reference.feed_forward(x, *products, activation=row, noise=factors)
    flat = x.ndim == 2
    rows = x if flat else x.reshape(-1, x.shape[-1])
    seed = draw_seed(x.device) if options.p > 0.0 else None
    run = compiled.feed_forward if chosen.backend == "compiled" else rule.feed_forward
    y = run(rows, products, seed, chosen)
    return y if flat else y.view(*x.shape[:-1], y.shape[-1])


def explain(x: Tensor, products: tuple, options: Options) -> dispatch.Choice:
    """The choice of `call` for these inputs; raises what that would raise."""
    *_, choice = _prepare(x, products, options)
    if needs_textbook():
        if options.backend == "triton":
            raise ValueError(f"backend must be 'auto' under {TRANSFORMS}; got 'triton'")
        return dispatch.Choice("reference", f"{TRANSFORMS} is on")
    return choice


def _prepare(x: Tensor, products: tuple, options: Options) -> tuple:
    """(x and products as autocast casts them, row, chosen options, choice), once all fits together."""
    try:
        cast = autocasts(x)
        if cast:  # the weights too, when x comes from another layer and has been cast already
            dtype = torch.get_autocast_dtype(x.device.type)
            x, products = x.to(dtype), tuple(None if q is None else q.autocast(dtype) for q in products)
        row, chosen, choice = _check(options, x)
        fit = fits(row, x, products, cast)
    except AttributeError:
        named(x, products)  # raises for what is no tensor
        raise
    if not fit:
        explain_misfit(row, x, products)
    return x, products, row, chosen, choice


def _check(options: Options, x: Tensor) -> tuple[Activation, Options, dispatch.Choice]:
    if type(options.activation) is str and not torch.compiler.is_compiling():
        try:
            return _known(*options, x.device, x.dtype)
        except TypeError:  # an option that cannot be hashed
            pass
    return _checked(*options, x.device, x.dtype)


def _checked(activation, p, save, chunk_tokens, backend, device, dtype):
    """(row, options with the row's name and the backend that runs, choice)."""
    row = activations.resolve(activation)
    check_options(row, p, save, chunk_tokens, backend)
    choice = dispatch.choose(backend, device, dtype)
    return row, Options(row.name, p, save, chunk_tokens, choice.backend), choice


_known = lru_cache(256, typed=True)(_checked)  # the same options are checked once; 8.0 is not 8
