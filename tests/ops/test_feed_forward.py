"""The op against the reference: in float64, in low precision, under autocast, with unusual strides."""

import math

import pytest
import torch
from torch import Tensor

from ffn.activations import TABLE
from ffn.ops.dropout_mask import draw_seed, noise
from ffn.ops.feed_forward import feed_forward
from tests.ops.samples import F64, NAMES, SAVES, Arguments, by_reference, draw, gradients, leaf

LOW = [torch.float32, torch.bfloat16, torch.float16]
names = pytest.mark.parametrize("name", NAMES)
saves = pytest.mark.parametrize("save", SAVES, ids=["preact", "input", "chunks"])


def with_mask(arguments: Arguments, dropout: float, **options) -> tuple[Tensor, Tensor | None]:
    """Return (y of the op, the factors (..., H) of its dropout or None)."""
    torch.manual_seed(5)
    y = feed_forward(*arguments, dropout=dropout, **options)
    if dropout == 0.0:
        return y, None
    torch.manual_seed(5)
    hidden = (*arguments.x.shape[:-1], arguments.up.shape[0])
    factors = noise(draw_seed(y.device), math.prod(hidden[:-1]), hidden[-1], dropout, y.dtype)
    return y, factors.view(hidden)


@names
@saves
def test_op_equals_reference_in_float64(name: str, save: dict) -> None:
    for bias in (True, False):
        for dropout in (0.0, 0.4):
            arguments = draw(name, bias=bias, shape=(2, 4))
            y, factors = with_mask(arguments, dropout, activation=name, **save)
            dy = torch.randn_like(y)
            expected = by_reference(*arguments, activation=TABLE[name], noise=factors)
            torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-12)
            for ours, theirs in zip(
                gradients(y, arguments, dy), gradients(expected, arguments, dy), strict=True
            ):
                torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


def errors(results: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [(r.double() - e).abs().max().item() for r, e in zip(results, exact, strict=True)]


def check_error_of_low_precision(name: str, arguments: Arguments, dropout: float, **options) -> None:
    """Assert errors at most twice plain torch's in the same dtype, plus one ulp of the largest value."""
    dtype = arguments.x.dtype
    y, factors = with_mask(arguments, dropout, activation=name, **options)
    assert y.dtype == dtype
    dy = torch.randn_like(y)
    ours = [y, *gradients(y, arguments, dy)]
    assert all(grad.dtype == dtype for grad in ours)
    row = TABLE[name]
    y = by_reference(*arguments, activation=row, noise=factors)
    plain = [y, *gradients(y, arguments, dy)]
    wide = arguments.to(F64)
    # The oracle uses the op's rounded scale, so that only the op's other rounding counts.
    y = by_reference(*wide, activation=row, noise=None if factors is None else factors.double())
    exact = [y, *gradients(y, wide, dy.double())]
    for got, allowed, oracle in zip(errors(ours, exact), errors(plain, exact), exact, strict=True):
        assert got <= 2.0 * allowed + torch.finfo(dtype).eps * oracle.abs().max().item()


@names
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_low_precision_is_as_exact_as_plain_torch(name: str, dtype: torch.dtype) -> None:
    for save in SAVES:
        for dropout in (0.0, 0.25):
            arguments = draw(name, shape=(8,), widths=(24, 40, 16), dtype=dtype)
            check_error_of_low_precision(name, arguments, dropout, **save)


@pytest.mark.parametrize("name", ["gelu", "swiglu"])
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_large_products_are_as_exact_as_plain_torch(name: str, dtype: torch.dtype) -> None:
    arguments = draw(name, shape=(64,), widths=(128, 640, 96), dtype=dtype)  # large enough for oneDNN
    for save in ({"save": "preact"}, {"save": "input", "chunk_tokens": 48}):
        check_error_of_low_precision(name, arguments, 0.25, **save)


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_chunks_are_summed_in_a_wider_dtype(dtype: torch.dtype) -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        arguments = draw("gelu", shape=(512,), widths=(24, 40, 16), dtype=dtype)
        check_error_of_low_precision("gelu", arguments, 0.25, save="input", chunk_tokens=1)


@names
def test_autocast_is_as_exact_as_plain_torch(name: str) -> None:
    arguments = draw(name, shape=(8,), widths=(24, 40, 16), dtype=torch.float32)
    wide, row = arguments.to(F64), TABLE[name]
    dy = torch.randn(8, 16).bfloat16()
    for dropout in (0.0, 0.25):
        with torch.autocast("cpu", torch.bfloat16):
            y, factors = with_mask(arguments, dropout, activation=name)
            theirs = by_reference(*arguments, activation=row, noise=factors)
        exact = by_reference(*wide, activation=row, noise=None if factors is None else factors.double())
        assert y.dtype == theirs.dtype == torch.bfloat16
        ours = [y, *gradients(y, arguments, dy)]
        assert all(grad.dtype == torch.float32 for grad in ours[1:])
        plain = [theirs, *gradients(theirs, arguments, dy)]
        exact = [exact, *gradients(exact, wide, dy.double())]
        for got, allowed, oracle in zip(errors(ours, exact), errors(plain, exact), exact, strict=True):
            assert got <= 2.0 * allowed + torch.finfo(torch.bfloat16).eps * oracle.abs().max().item()


@names
def test_backward_under_autocast_keeps_forwards_dtypes(name: str) -> None:
    arguments = draw(name, dtype=torch.float32)
    for forward in (True, False):
        for options in ({"create_graph": True}, {}):
            with torch.autocast("cpu", torch.bfloat16, enabled=forward):
                y, _ = with_mask(arguments, 0.2, activation=name)
            dy = torch.randn_like(y)
            without = torch.autograd.grad(y, arguments.given(), dy, retain_graph=True)
            with torch.autocast("cpu", torch.bfloat16):
                within = torch.autograd.grad(y, arguments.given(), dy, **options)
            precision = torch.bfloat16 if forward else torch.float32
            for ours, theirs in zip(within, without, strict=True):
                assert ours.dtype == torch.float32
                room = 8 * torch.finfo(precision).eps * max(1.0, theirs.abs().max().item())
                torch.testing.assert_close(ours, theirs, rtol=0.0, atol=room if options else 0.0)


def test_autocast_of_already_cast_inputs() -> None:
    first, second = draw("swiglu", dtype=torch.float32), draw("swiglu", widths=(5, 8, 3), dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        between = feed_forward(*first, activation="swiglu")
        y = feed_forward(*second._replace(x=between), activation="swiglu")
    assert between.dtype == y.dtype == torch.bfloat16
    grads = torch.autograd.grad(y.float().sum(), [*first.given(), *second.given()[1:]])
    assert all(grad.dtype == torch.float32 for grad in grads)


def test_autocast_leaves_float64_alone() -> None:
    arguments = draw("gelu")
    with torch.autocast("cpu", torch.bfloat16):
        assert feed_forward(*arguments).dtype == F64


def strided(kind: str) -> Tensor:
    """Return a tensor (4, 3, 6) with unusual strides."""
    base = torch.randn(4, 3, 12, dtype=F64)
    return {
        "sliced": base[..., ::2],
        "transposed": base[..., :6].contiguous().transpose(0, 1).contiguous().transpose(0, 1),
        "columns": base[..., :6].permute(2, 0, 1).contiguous().permute(1, 2, 0),
        "expanded": base[:, :1, :6].expand(4, 3, 6),
        "flipped": base[..., :6].flip(-1),
    }[kind]


@pytest.mark.parametrize("kind", ["sliced", "transposed", "columns", "expanded", "flipped"])
def test_strides_change_nothing(kind: str) -> None:
    for name in ("mish", "geglu"):
        for save in SAVES:
            arguments = draw(name, shape=(4, 3))
            other = arguments._replace(x=leaf(strided(kind).detach()))
            plain = arguments._replace(x=leaf(strided(kind).detach().contiguous()))
            plain.x.data.copy_(other.x)
            results = []
            for given in (other, plain):
                y, _ = with_mask(given, 0.3, activation=name, **save)
                dy = torch.linspace(-1, 1, y.numel(), dtype=F64).view(5, 4, 3).permute(1, 2, 0)
                results.append([y, *gradients(y, given, dy)])
            for ours, theirs in zip(*results, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_strided_weights() -> None:
    arguments = draw("swiglu")
    turned = arguments._replace(
        up=leaf(arguments.up.detach().t().contiguous().t()),
        down=leaf(arguments.down.detach().repeat_interleave(2, 0)[::2]),
        up_bias=leaf(arguments.up_bias.detach().repeat_interleave(2)[::2]),
    )
    results = [feed_forward(*given, activation="swiglu") for given in (arguments, turned)]
    torch.testing.assert_close(*results)
    dy = torch.randn_like(results[0])
    for ours, theirs in zip(
        gradients(results[0], arguments, dy), gradients(results[1], turned, dy), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
