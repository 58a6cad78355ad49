"""`decode` against the formula in float64, with every tile and unchanged inputs."""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck
from torch.nn.functional import linear

from ffn.activations import TABLE
from ffn.ops.kernels import decode
from tests.ops.kernels.interpreted.oracle import DTYPES, F32, F64, NAMES, bits, embedded, guarded, whole

TOKENS = [0, 1, 3, 16, 17, 32]


class Arguments(NamedTuple):
    """The op's tensor arguments; None for absent ones."""

    x: Tensor
    up: Tensor
    gate_w: Tensor | None
    bias: Tensor | None
    gate_bias: Tensor | None

    def given(self) -> list[Tensor]:
        return [t for t in self if t is not None]


def draw(name: str, N: int, D: int, H: int, dtype: torch.dtype = F32, bias: bool = True) -> Arguments:
    """Return random arguments; matrices are views of larger buffers filled with NaN."""
    gated = TABLE[name].gated
    x = embedded(torch.randn(N, D).to(dtype))
    up, gate_w = (embedded((torch.randn(H, D) / max(D, 1) ** 0.5).to(dtype)) for _ in range(2))
    offset, gate_offset = (torch.randn(H).to(dtype) if bias else None for _ in range(2))
    return Arguments(x, up, gate_w if gated else None, offset, gate_offset if gated else None)


def textbook(name: str, arguments: Arguments, dtype: torch.dtype) -> Tensor:
    x, up, gate_w, bias, gate_bias = (None if t is None else t.to(dtype) for t in arguments)
    pre = linear(x, up, bias)
    return TABLE[name](pre) if gate_w is None else TABLE[name](linear(x, gate_w, gate_bias)) * pre


def check(name: str, arguments: Arguments) -> Tensor:
    """Assert an error of at most twice plain torch's in the same dtype, plus one ulp of the largest value."""
    dtype, before = arguments.x.dtype, [bits(whole(t)).clone() for t in arguments.given()]
    h, exact = decode.op(*arguments, name), textbook(name, arguments, F64)
    assert h.dtype == dtype
    assert h.is_contiguous()
    assert h.shape == exact.shape
    assert all(torch.equal(bits(whole(t)), b) for t, b in zip(arguments.given(), before, strict=True))
    if h.numel() > 0:
        error, allowed = (
            (y.double() - exact).abs().max().item() for y in (h, textbook(name, arguments, dtype))
        )
        assert error <= 2.0 * allowed + torch.finfo(dtype).eps * exact.abs().max().item()
    return h


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_every_activation(name: str, dtype: torch.dtype) -> None:
    for N in (1, 5):
        for bias in (True, False):
            check(name, draw(name, N, 77, 19, dtype, bias))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["gelu", "swiglu"])
@pytest.mark.parametrize("N", TOKENS)
def test_token_counts(monkeypatch, N: int, name: str, dtype: torch.dtype) -> None:
    for programs in (decode.PROGRAMS, 1):  # 1 selects the tile for wide weights
        monkeypatch.setattr(decode, "PROGRAMS", programs)
        for D, H in ((513, 69), (512, 64), (528, 1)):
            check(name, draw(name, N, D, H, dtype))


@given(st.data())
@settings(max_examples=40)
def test_any_sizes(data: st.DataObject) -> None:
    choose = data.draw
    torch.manual_seed(choose(st.integers(0, 2**31)))
    name, dtype = choose(st.sampled_from(NAMES)), choose(st.sampled_from(DTYPES))
    sizes = [choose(st.integers(0, most)) for most in (decode.MOST_TOKENS, 300, 70)]
    check(name, draw(name, *sizes, dtype, choose(st.booleans())))


@pytest.mark.parametrize("N", [1, 16, 32])
def test_empty_sums_and_empty_results(N: int) -> None:
    check("gelu", draw("gelu", N, 0, 5))
    check("swiglu", draw("swiglu", N, 0, 5))
    check("swiglu", draw("swiglu", N, 5, 0))


@pytest.mark.parametrize("name", ["relu", "geglu"])
def test_no_write_outside_h(monkeypatch, name: str) -> None:
    for N, H in ((1, 17), (3, 33), (17, 16), (32, 1)):
        arguments = draw(name, N, 24, H)
        with guarded(monkeypatch):
            decode.op(*arguments, name)


@pytest.mark.parametrize("N", [1, 4])
def test_strided_columns_and_packed_weights(N: int) -> None:
    arguments = draw("swiglu", N, 40, 20)
    apart = Arguments(
        torch.randn(40, N).t(), torch.randn(20, 80)[:, ::2], torch.randn(40, 20).t(), None, None
    )
    check("swiglu", apart)
    check("swiglu", arguments._replace(x=torch.randn(1, 40).expand(N, 40)))
    for halves in (torch.randn(40, 40).chunk(2), torch.randn(20, 80).chunk(2, 1)):
        check("swiglu", arguments._replace(gate_w=halves[0], up=halves[1]))


def test_single_bias() -> None:
    for N in (1, 4):
        arguments = draw("geglu", N, 24, 20)
        check("geglu", arguments._replace(bias=None))
        check("geglu", arguments._replace(gate_bias=None))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("N", [1, 2])
def test_preactivations_are_rounded_before_the_activation(N: int, dtype: torch.dtype) -> None:
    """1 + 0.4 eps is stored as 1; its square, 1 + 0.8 eps, would be stored as 1 + eps."""
    part = 0.4 * torch.finfo(dtype).eps
    x, up, bias = torch.ones(N, 2), torch.tensor([[1.0, part]]), torch.tensor([part])
    x, up, bias = (t.to(dtype) for t in (x, up, bias))
    one = torch.ones(N, 1, dtype=dtype)
    assert torch.equal(decode.op(x, up, None, None, None, "relu2"), one)
    assert torch.equal(decode.op(x[:, :1], up[:, :1], None, bias, None, "relu2"), one)


@pytest.mark.parametrize("N", [7, 20])
def test_tokens_are_independent(N: int) -> None:
    arguments = Arguments(*(torch.randint(-4, 5, (rows, 70)).float() for rows in (N, 40, 40)), None, None)
    h = decode.op(*arguments, "swiglu")  # integers, so sums are exact in any order
    order = torch.randperm(N)
    assert torch.equal(decode.op(*arguments._replace(x=arguments.x[order]), "swiglu"), h[order])
    for n in range(3):
        assert torch.equal(decode.op(*arguments._replace(x=arguments.x[n : n + 1]), "swiglu"), h[n : n + 1])
    arguments.x[-1] = float("nan")
    assert torch.equal(decode.op(*arguments, "swiglu")[:-1], h[:-1])


def test_too_many_tokens_raise() -> None:
    with pytest.raises(ValueError, match=r"^x must have at most 32 tokens, got 33"):
        decode.op(*draw("gelu", 33, 8, 8), "gelu")


@pytest.mark.parametrize("aligned", [True, False])
def test_tile_sizes(aligned: bool) -> None:
    for gated, itemsize, H, N in product((True, False), (2, 4), (768, 3072, 14336), range(1, 33)):
        t = decode.tile(N, H, itemsize, gated, aligned)
        assert t.tokens >= N
        assert t.depth >= 16  # the smallest depth for tensor cores
        assert t.depth * itemsize >= (128 if aligned else 64)
        assert t.rows * t.depth * itemsize in (2048, 4096, 8192)


@pytest.mark.parametrize("name", ["gelu", "swiglu"])
def test_opcheck(name: str) -> None:
    for N in (1, 3, 0):
        for bias in (True, False):
            opcheck(decode.op, (*draw(name, N, 24, 20, bias=bias), name))
