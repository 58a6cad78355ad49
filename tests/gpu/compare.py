"""Samples on a device; compare the op with plain torch in their dtype and the reference in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.tiles import CANDIDATES
from ffn.activations import TABLE
from ffn.ops import dispatch
from ffn.ops.dropout_mask import draw_seed
from ffn.ops.feed_forward import feed_forward
from ffn.ops.kernels.tilings import Tiling
from tests.ops.samples import F64, Arguments, by_reference, draw, gradients, leaf

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FEWEST = 1 << 15  # fewest elements of h for which the tests fuse products in half precision
FUSED = (300,), (256, 1024, 256)  # tokens and widths D, H, O that are fused in half precision
ODD = (33,), (37, 61, 29)  # sizes that tensor descriptors do not support


def sample(name: str, device: torch.device, dtype: torch.dtype, shape: Sequence[int] = FUSED[0],
           widths: tuple[int, int, int] = FUSED[1], bias: bool = True) -> Arguments:  # fmt: skip
    """Return random leaves. In half precision they are multiples of 1/64, with sums exact in float32.

    So all implementations compute equal preactivations, on the same side of an activation's kink.
    """
    with device:
        drawn = draw(name, bias=bias, shape=shape, widths=widths, dtype=dtype)
    if dtype == torch.float32:
        return drawn
    return Arguments(*(None if t is None else leaf(t.detach().mul(64).round().div(64)) for t in drawn))


def fuse_large(forward: bool, capability, dtype: str, gated: bool, D: int, H: int, N: int) -> Tiling | None:
    """Replace `tilings.choose`: the first candidate tiling for large enough cases in half precision."""
    return CANDIDATES[forward, gated][0] if dtype != "float32" and N * H >= FEWEST else None


def results(run: Callable[..., Tensor], arguments: Arguments, dy: Tensor) -> list[Tensor]:
    """Return y and, if it requires gradients, all gradients."""
    y = run(*arguments)
    return [y, *gradients(y, arguments, dy.to(y.dtype))] if y.requires_grad else [y]


def check(name: str, arguments: Arguments, p: float = 0.0, *, backend: str = "triton",
          dy: Tensor | None = None, **options) -> None:  # fmt: skip
    """Assert an error of at most twice plain torch's in the same dtype, plus one ulp of the largest value.

    In float32 plus four ulps, since the GPU's fast exp and division are off by two ulps each.
    """
    assert not torch.backends.cuda.matmul.allow_tf32
    x, H, ulps = arguments.x, arguments.up.shape[0], 4 if arguments.x.dtype == torch.float32 else 1
    if dy is None:
        dy = torch.randn(*x.shape[:-1], arguments.down.shape[0], device=x.device).to(x.dtype)
    options |= {"activation": name, "dropout": p, "backend": backend}
    torch.manual_seed(5)
    ours = results(lambda *a: feed_forward(*a, **options), arguments, dy)
    noise = torch.ones(*x.shape[:-1], H, device=x.device)
    if p > 0.0:
        torch.manual_seed(5)
        factors = dispatch.module(backend).noise
        noise = factors(draw_seed(x.device), noise.numel() // H, H, p, torch.float32).view_as(noise)

    def textbook(dtype: torch.dtype) -> list[Tensor]:
        book = {"activation": TABLE[name], "noise": noise.to(dtype)}
        return results(lambda *a: by_reference(*a, **book), arguments.to(dtype), dy)

    for got, plain, exact in zip(ours, textbook(x.dtype), textbook(F64), strict=True):
        assert got.dtype == x.dtype
        error, theirs = ((t.double() - exact).abs().max().item() for t in (got, plain))
        allowed = 2 * theirs + ulps * torch.finfo(x.dtype).eps * exact.abs().max().item()
        assert error <= allowed, f"{tuple(got.shape)}: error {error:.2e}, plain torch {theirs:.2e}"


def assert_alike(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    """Assert differences of at most 2% of the largest value: the same numbers, rounded elsewhere."""
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0.0, atol=0.02 * b.abs().max().item())


def assert_equal(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    torch.testing.assert_close(list(ours), list(theirs), rtol=0.0, atol=0.0)
