"""Int8 matmuls: errors within the bound of rounding, each token by itself, NaN and infinity kept."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ffn.activations import TABLE
from ffn.ops import hardware
from ffn.packing.float_copies import Packed
from ffn.packing.int8_copies import Quantized
from tests.ops.samples import by_reference

pytestmark = pytest.mark.skipif(not hardware.int8_in_onednn(), reason="no int8 matmuls on this processor")


def bound(x: Tensor, weight: Tensor) -> Tensor:
    """Return how far rounding x and the weight, by half a step each, may move x weight^T, in float64."""
    x, weight = x.double().abs(), weight.double().abs()
    off_x, off_weight = x.amax(-1, keepdim=True) / 254, weight.amax(-1) / 254
    moved = off_x * weight.sum(-1) + x.sum(-1, keepdim=True) * off_weight
    return moved + x.shape[-1] * off_x * off_weight


def draw(tokens: int, width: int, height: int, seed: int, kind: str) -> tuple[Tensor, Tensor]:
    """Return x (tokens, width) and a weight (height, width), with unusual rows as `kind` says."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, generator=generator)
    weight = torch.randn(height, width, generator=generator)
    if kind == "outlier":
        x[0, -1], weight[0, 0] = 1e4, -1e4
    elif kind == "constant":
        x[0], weight[0] = -3.0, 0.25
    elif kind == "zero":
        x[-1], weight[-1] = 0.0, 0.0
    elif kind == "tiny":
        x[0], weight[0] = 1e-30 * x[0], 1e-30 * weight[0]
    elif kind == "small":
        x, weight = 0.002 * x, 0.002 * weight
    return x, weight


KINDS = st.sampled_from(["normal", "outlier", "constant", "zero", "tiny", "small"])
SIZES = st.integers(1, 40), st.integers(1, 300), st.integers(1, 70), st.integers(0, 2**32)


@given(*SIZES, KINDS, st.booleans(), st.sampled_from([torch.float32, torch.bfloat16]))
def test_the_error_is_within_the_bound_of_rounding(tokens, width, height, seed, kind, biased, dtype) -> None:
    x, weight = (t.to(dtype) for t in draw(tokens, width, height, seed, kind))
    bias = torch.randn(height).to(dtype) if biased else None
    y = Quantized((weight, bias)).linear(x)
    exact = x.double() @ weight.double().T + (0.0 if bias is None else bias.double())
    assert y.dtype == dtype
    slack = 4 * torch.finfo(dtype).eps * exact.abs() + 1e-5 * bound(x, weight) + 1e-5
    assert ((y.double() - exact).abs() <= bound(x, weight) + slack).all()


@given(*SIZES, KINDS)
def test_a_token_does_not_depend_on_the_others(tokens, width, height, seed, kind) -> None:
    x, weight = draw(tokens + 2, width, height, seed, kind)
    product = Quantized((weight, None))
    y = product.linear(x)
    assert torch.equal(product.linear(x[1:]), y[1:])
    assert torch.equal(product.linear(x.flip(0)), y.flip(0))
    alone = product.linear(x[:1])
    assert ((alone - y[:1]).abs() <= 2 * bound(x[:1], weight) + 1e-6 * y[:1].abs()).all()


def test_without_fbgemm_a_single_token_equals_its_row_in_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "int8_in_fbgemm", lambda: False)
    x, product = torch.randn(3, 40), Quantized((torch.randn(9, 40), torch.randn(9)))
    assert product.layouts[0].alone is None
    assert torch.equal(product.linear(x[:1]), product.linear(x)[:1])


def test_shapes_and_strides() -> None:
    product = Quantized((torch.randn(6, 8), torch.randn(6)))
    x = torch.randn(3, 5, 8)
    y = product.linear(x)
    assert y.shape == (3, 5, 6)
    assert torch.equal(product.linear(x.transpose(0, 1)), y.transpose(0, 1))
    assert torch.equal(product.linear(x[:, :1].expand(3, 4, 8)), y[:, :1].expand(3, 4, 6))
    assert torch.equal(product.linear(x.mT.contiguous().mT), y)
    assert product.fit(x)
    assert not product.fit(x[:0])
    assert product.linear(x[0, 0]).shape == (6,)
    assert product.linear(x[:1, :1]).shape == (1, 1, 6)


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_stay_in_their_token(bad: float, tokens: int) -> None:
    x, weight = torch.randn(tokens, 8), torch.randn(6, 8)
    clean = Quantized((weight, None)).linear(x)
    x[0, 3] = bad
    y = Quantized((weight, torch.zeros(6))).linear(x)
    assert not y[0].isfinite().any()
    assert torch.equal(y[1:], clean[1:])
    weight[2, 5] = bad
    assert not Quantized((weight, None)).linear(torch.ones(tokens, 8))[:, 2].isfinite().any()
    block = Quantized((torch.randn(5, 8), torch.randn(8, 5), None, None, None, None))
    for activation in ("gelu", "silu", "relu", "tanh"):
        assert not block.feed_forward(torch.full((tokens, 8), float("nan")), activation).isfinite().any()


@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("activation", [name for name, row in TABLE.items() if row.formula])
def test_the_block_is_near_the_reference(activation: str, tokens: int) -> None:
    x, up, down = torch.randn(tokens, 64), torch.randn(96, 64) / 8, torch.randn(48, 96) / 8
    gate = torch.randn(96, 64) / 8 if TABLE[activation].gated else None
    biases = torch.randn(96), torch.randn(48), None if gate is None else torch.randn(96)
    y = Quantized((up, down, gate, *biases)).feed_forward(x, activation)
    exact = by_reference(
        *(t if t is None else t.double() for t in (x, up, down, gate, *biases)), activation=TABLE[activation]
    )
    assert (y - exact).norm() <= 0.05 * exact.norm()


@pytest.mark.parametrize("form", [Packed, Quantized])
def test_joined_copies_equal_separate_ones(form: type[Packed]) -> None:
    x, weights, biases = torch.randn(5, 8), torch.randn(3, 6, 8).unbind(), torch.randn(3, 6).unbind()
    joined = form((*weights, *biases), joined=True)
    assert joined.heights == [6, 6, 6]
    apart = [form(pair).linear(x) for pair in zip(weights, biases, strict=True)]
    torch.testing.assert_close(joined.linear(x), torch.cat(apart, 1))
    assert joined.are_of((*weights, *biases))
    biases[1].zero_()
    assert not joined.are_of((*weights, *biases))
    unbiased = form((*weights, None, None, None), joined=True)
    torch.testing.assert_close(unbiased.linear(x), torch.cat([form((w, None)).linear(x) for w in weights], 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 7])
def test_a_bias_is_read_and_not_copied(tokens: int, dtype: torch.dtype) -> None:
    x, weight, bias = (
        torch.randn(tokens, 8, dtype=dtype),
        torch.randn(6, 8, dtype=dtype),
        torch.zeros(6, dtype=dtype),
    )
    packed = Quantized((weight, bias))
    before = packed.linear(x)
    bias.fill_(16.0)
    torch.testing.assert_close(packed.linear(x), before + 16.0)


def test_small_and_large_tokens_have_the_same_relative_error() -> None:
    x, weight = torch.randn(1, 64), torch.randn(6, 64)
    sparse = torch.zeros(1, 64).index_fill_(1, torch.tensor([3]), 0.1)
    packed = Quantized((weight, None))
    for token in (x, x * 1e-3, x * 1e-20, x * 1e18, x * 1e30, sparse, sparse * 1e-3):
        exact = token.double() @ weight.double().t()
        assert (packed.linear(token) - exact).norm() <= 0.03 * exact.norm()


def test_weights_too_wide_for_int32_sums_are_refused() -> None:
    widest = (2**31 - 1) // (255 * 127)
    one = torch.ones(1, widest)
    assert Quantized.why_not(one) is None
    torch.testing.assert_close(Quantized((one, None)).linear(one), torch.tensor([[float(widest)]]))
    assert f"{widest + 1} wide" in str(Quantized.why_not(torch.ones(1, widest + 1)))


def test_unsupported_machines_are_recognised(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_) -> None:
        raise RuntimeError("no such op")

    monkeypatch.setattr(hardware, "fbgemm_layout", absent)
    assert not hardware.int8_in_fbgemm.__wrapped__()
    monkeypatch.setattr(hardware.platform, "machine", lambda: "arm64")
    assert not hardware.int8_in_onednn.__wrapped__()
