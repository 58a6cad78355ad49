"""The statistics of the initialisations; init="torch" draws torch's numbers."""

import math

import pytest
import torch
from torch import nn

from ffn.nn import FeedForward
from ffn.nn.init import INITS, check_init, init_linear

OUT, IN, LAYERS, LAYER = 300, 500, 12, 3
CUT = 0.8796256610342398  # standard deviation of the standard normal distribution cut at two sigma


def expected(name: str, residual: bool = False, out: int = OUT, fan_in: int = IN) -> tuple[float, float]:
    """Return (standard deviation, bound) of a weight (out, fan_in) in layer LAYER, by the formulas."""
    match name:
        case "torch":
            return 1 / math.sqrt(3 * fan_in), 1 / math.sqrt(fan_in)
        case "xavier":
            return math.sqrt(2 / (fan_in + out)), math.sqrt(6 / (fan_in + out))
        case "he":
            return math.sqrt(2 / fan_in), math.inf
        case "gpt2":
            return 0.02 / math.sqrt(2 * LAYERS) if residual else 0.02, math.inf
        case "depth_scaled":
            sigma = 0.02 / math.sqrt(2 * (LAYER + 1)) if residual else 0.02
            return sigma * CUT, 2 * sigma
        case "zero_out":
            return (0.0, 0.0) if residual else (1 / math.sqrt(fan_in), math.sqrt(3 / fan_in))
    raise KeyError(name)


def test_unknown_init_raises() -> None:
    assert INITS == ("torch", "xavier", "he", "gpt2", "depth_scaled", "zero_out")
    for ask in (
        check_init,
        lambda name: FeedForward(4, init=name),
        lambda name: init_linear(nn.Linear(2, 2), name),
    ):
        with pytest.raises(ValueError, match=r"^init .*got 'kaiming'"):
            ask("kaiming")


@pytest.mark.parametrize("name", INITS)
@pytest.mark.parametrize("residual", [False, True], ids=["reading", "writing"])
def test_mean_spread_and_bounds(name: str, residual: bool) -> None:
    linear = nn.Linear(IN, OUT)
    init_linear(linear, name, residual=residual, num_layers=LAYERS, layer=LAYER)
    std, bound = expected(name, residual)
    weight, n = linear.weight.double(), IN * OUT
    assert weight.abs().max() <= bound * (1 + 1e-6)
    assert weight.mean().abs() <= 5.5 * std / math.sqrt(n)
    assert weight.std().item() == pytest.approx(
        std, rel=5.5 / math.sqrt(2 * n)
    )  # for a normal distribution; smaller for the others
    if bound < math.inf:
        assert weight.abs().max() >= 0.99 * bound
    elif std:
        assert 4.0 * std < weight.abs().max() < 6.5 * std
    if name == "torch":
        assert 0.0 < linear.bias.abs().max() <= 1 / math.sqrt(IN)
        assert linear.bias.std().item() == pytest.approx(1 / math.sqrt(3 * IN), rel=0.15)
    else:
        assert not linear.bias.any()


def test_rows_and_columns_have_equal_spread() -> None:
    for name in INITS:
        linear = nn.Linear(IN, OUT, bias=False)
        init_linear(linear, name)
        spread, _ = expected(name)
        for axis in (0, 1):
            assert (linear.weight.std(axis) / spread - 1.0).abs().max() < 0.25


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_init_torch_draws_the_same_numbers_as_nn_sequential(gated: bool, bias: bool) -> None:
    widths = [(6, 10)] * (1 + gated) + [(10, 5)]
    torch.manual_seed(3)
    sequential = nn.Sequential(*(nn.Linear(*width, bias=bias) for width in widths))
    torch.manual_seed(3)
    block = FeedForward(6, 10, out_dim=5, bias=bias, activation="swiglu" if gated else "gelu")
    torch.manual_seed(3)
    again = FeedForward(6, 10, out_dim=5, bias=bias, activation="swiglu" if gated else "gelu", init="he")
    again.init = "torch"
    torch.manual_seed(3)
    again.reset_parameters()
    for ours, reset, theirs in zip(
        block.parameters(), again.parameters(), sequential.parameters(), strict=True
    ):
        assert torch.equal(ours, theirs)
        torch.testing.assert_close(reset, theirs)


@pytest.mark.parametrize("name", INITS)
def test_a_generator_replaces_the_global_one(name: str) -> None:
    block = FeedForward(20, 30, activation="swiglu", init=name)
    results = []
    for seed in (5, 5, 6):
        before = torch.get_rng_state()
        block.reset_parameters(num_layers=2, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(torch.get_rng_state(), before)
        results.append([p.detach().clone() for p in block.parameters()])
    first, same, other = results
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    assert not torch.equal(first[0], other[0])
    block.reset_parameters()
    assert not torch.equal(torch.get_rng_state(), before)


def test_the_global_seed_decides_without_a_generator() -> None:
    for name in INITS:
        blocks = []
        for _ in range(2):
            torch.manual_seed(1)
            blocks.append(FeedForward(4, 8, init=name))
        assert all(torch.equal(a, b) for a, b in zip(*(b.parameters() for b in blocks), strict=True))


def test_zero_out_starts_at_zero_and_learns() -> None:
    for activation in ("gelu", "swiglu"):
        block = FeedForward(6, 10, activation=activation, init="zero_out")
        x = torch.randn(3, 6)
        assert not block(x).any()
        block(x).sum().backward()
        assert block.down_proj.weight.grad.any()
        assert not block.up_proj.weight.grad.any()  # zero until the output is not zero


def test_he_keeps_the_scale_through_relu() -> None:
    linear = nn.Linear(1000, 1000)
    init_linear(linear, "he")
    y = linear(torch.randn(200, 1000).relu_())
    assert y.var().item() == pytest.approx(1.0, rel=0.05)


@pytest.mark.parametrize("name", INITS)
def test_depth_scales_only_down_proj(name: str) -> None:
    block = FeedForward(200, 400, activation="swiglu", init=name)
    block.reset_parameters(num_layers=8, layer=7, generator=torch.Generator().manual_seed(0))
    deep = [p.detach().clone() for p in block.parameters()]
    block.reset_parameters(generator=torch.Generator().manual_seed(0))
    shrunk = {"gpt2": 1 / math.sqrt(8), "depth_scaled": 1 / math.sqrt(8)}.get(name, 1.0)
    for (key, shallow), ours in zip(block.named_parameters(), deep, strict=True):
        factor = shrunk if key == "down_proj.weight" else 1.0
        torch.testing.assert_close(ours, shallow * factor)


@pytest.mark.parametrize("name", INITS)
def test_meta_tensors_are_filled_later(name: str) -> None:
    before = torch.get_rng_state()
    block = FeedForward(6, 10, activation="swiglu", init=name, device="meta")
    assert all(p.is_meta for p in block.parameters())
    block.reset_parameters()
    assert torch.equal(torch.get_rng_state(), before)
    block.to_empty(device="cpu")
    for p in block.parameters():
        p.data.fill_(torch.nan)
    block.reset_parameters()
    assert all(p.isfinite().all() for p in block.parameters())
    assert block(torch.randn(2, 6)).shape == (2, 6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes(dtype: torch.dtype) -> None:
    for name in INITS:
        linear = nn.Linear(50, 40, dtype=dtype)
        init_linear(linear, name)
        spread, _ = expected(name, out=40, fan_in=50)
        assert linear.weight.std().item() == pytest.approx(spread, rel=0.1)
        assert linear.weight.requires_grad
