"""The block under torch.compile: the reference formula in checkpointed regions.

The compiler fuses the passes. Backward recomputes what a region computes inside; only inputs of regions are
saved. With save="preact" the regions are the first product and the rest, so x and the preactivations are
saved, as by the rule. With save="input" there is one region, so x alone is saved.
"""

from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ffn import activations
from ffn.ops import reference
from ffn.ops.dropout_mask import noise
from ffn.ops.options import Options

_region = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


def feed_forward(x: Tensor, products: tuple, seed: Tensor | None, options: Options) -> Tensor:
    """Return y (N, O) for tokens x (N, D), with the arguments of `ffn.ops.rule.feed_forward`."""
    products = tuple(None if q is None else q.with_seed() for q in products)
    step = options.chunk_tokens
    if step is None:
        return _chunk(x, products, seed, options, 0)
    parts = []
    for start in range(0, max(x.shape[0], 1), step):
        chunk = tuple(None if q is None else q.at(start) for q in products)
        parts.append(_chunk(x[start : start + step], chunk, seed, options, start))
    return torch.cat(parts)


def _chunk(x: Tensor, products: tuple, seed: Tensor | None, options: Options, row_start: int) -> Tensor:
    up, down, gate = products
    row, p = activations.TABLE[options.activation], options.p

    def first(x: Tensor) -> tuple[Tensor, ...]:
        return (up(x),) if gate is None else (up(x), gate(x))

    def second(pre: Tensor, pre_gate: Tensor | None = None) -> Tensor:
        tokens, width = pre.shape
        factors = None if seed is None else noise(seed, tokens, width, p, pre.dtype, row_start)
        return down(reference.hidden(pre, pre_gate, row, factors))

    def both(x: Tensor) -> Tensor:
        return second(*first(x))

    if not torch.is_grad_enabled():
        return both(x)
    if options.save == "input":
        return _region(both, x)  # pyright: ignore[reportReturnType]
    return _region(second, *_region(first, x))  # pyright: ignore[reportReturnType, reportGeneralTypeIssues]
