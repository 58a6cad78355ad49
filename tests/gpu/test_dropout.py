"""Dropout on a GPU: the mask is Philox at any shard offset, and equal seeds give equal results."""

import pytest
import torch

from ffn.ops import dispatch
from ffn.ops.dropout import dropout
from ffn.ops.feed_forward import feed_forward
from tests.gpu.compare import DTYPES, assert_equal, results, sample
from tests.ops.kernels.interpreted.oracle import factors
from tests.ops.masks import PROBABILITIES, check_counts

SHAPE = 70, 1100  # not multiples of a tile
STARTS = [(0, 0), (5, 8), (2**31 - 3, 4), (2**33 + 7, 2**20)]


@pytest.mark.parametrize("seed", [0, -1, 2**32, -(2**40) - 3, 2**63 - 1])
def test_mask_is_philox(device: torch.device, seed: int) -> None:
    ones, key = torch.ones(SHAPE, device=device), torch.tensor([seed], device=device)
    for row, col in STARTS:
        for p in (0.1, 0.5):
            ours = torch.ops.ffn.act(ones, None, key, "identity", p, row, col)
            assert torch.equal(ours.cpu(), factors(seed, p, *SHAPE, row, col))


def test_fused_products_of_a_shard_have_their_part_of_the_mask(device: torch.device) -> None:
    whole = factors(3, 0.5, 900, 512).to(device, torch.bfloat16)
    seed, tiling = torch.tensor([3], device=device), [64, 64, 32, 8, 2, 4, 2]
    eye = torch.eye(128, dtype=torch.bfloat16, device=device)
    for row, col in ((0, 0), (130, 64), (600, 384)):
        given, x = (seed, "identity", 0.5, row, col), eye.new_ones(256, 128)
        h, pre, _ = torch.ops.ffn.linear_act(x, eye, None, None, None, *given, True, tiling)
        dpre = pre  # overwrites it
        again, *_ = torch.ops.ffn.linear_dact(x, eye, pre, None, dpre, None, *given, True, True, tiling)
        assert_equal([h, dpre, again], [whole[row : row + 256, col : col + 128]] * 3)


@pytest.mark.parametrize("p", PROBABILITIES)
def test_dropped_share(device: torch.device, p: float) -> None:
    noise = dispatch.module("triton").noise(torch.tensor([1], device=device), 2048, 2048, p, torch.float32)
    dropped = noise.cpu() == 0.0
    check_counts(dropped.sum(), dropped.numel(), p)
    for dim in (0, 1):
        check_counts(dropped.sum(dim), 2048, p)


@pytest.mark.parametrize("name", ["gelu", "swiglu"])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_equal_seeds_give_bitwise_equal_results(device: torch.device, name: str, dtype: torch.dtype) -> None:
    arguments, runs = sample(name, device, dtype, (1000,), (768, 3072, 768)), []
    dy = torch.randn(1000, 768, device=device)
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(results(lambda *a: feed_forward(*a, activation=name, dropout=0.1), arguments, dy))
    first, again, other = runs
    assert_equal(first, again)
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(64, 1024), (7, 33, 37), (5,)], ids=str)
def test_dropout_has_one_mask_both_ways(
    device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    x = torch.ones(shape, dtype=dtype, device=device, requires_grad=True)
    y = dropout(x, 0.5)
    assert set(y.unique().tolist()) <= {0.0, 2.0}
    check_counts((y == 0.0).sum().cpu(), y.numel(), 0.5)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert torch.equal(dx, y)
    assert not torch.equal(dropout(x, 0.5), y) or x.numel() < 100
