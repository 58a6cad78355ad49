"""Statistics of dropout: its rate, and independence of elements, rows, columns and seeds."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from ffn.ops.dropout_mask import _mix_, draw_seed
from tests.ops.masks import PROBABILITIES, applied, check_counts, dropped

CPU = torch.device("cpu")
probabilities = pytest.mark.parametrize("p", PROBABILITIES)


def test_check_counts_notices_wrong_rates() -> None:
    check_counts(torch.tensor([5000]), 10_000, 0.5)
    check_counts(torch.tensor([5260]), 10_000, 0.5)
    for wrong in (5300, 4700, 0, 10_000):
        with pytest.raises(AssertionError):
            check_counts(torch.tensor([wrong]), 10_000, 0.5)


@probabilities
def test_rate_overall_per_row_and_per_column(p: float) -> None:
    for value, (rows, cols) in itertools.product((0, -1, 2**40 + 7), ((1024, 513), (3000, 64))):
        mask = dropped(rows, cols, p, value)
        check_counts(mask.sum(), rows * cols, applied(p))
        check_counts(mask.sum(0), rows, applied(p))
        check_counts(mask.sum(1), cols, applied(p))


def test_rate_for_each_sixteenth() -> None:
    for step in range(1, 16):
        check_counts(dropped(512, 512, step / 16, seed=step).sum(), 512 * 512, step / 16)


@pytest.mark.parametrize(("rows", "cols"), [(20_000, 1), (20_000, 3), (1, 20_001), (1, 1), (0, 5), (5, 0)])
def test_odd_and_narrow_widths(rows: int, cols: int) -> None:
    mask = dropped(rows, cols, 0.25)
    assert mask.shape == (rows, cols)
    if rows * cols > 1:
        check_counts(mask.sum(), rows * cols, 0.25)
        check_counts(mask.sum(0 if cols < 4 else 1), max(rows, cols), 0.25)


def check_independent(a: Tensor, b: Tensor, p: float) -> None:
    """Assert that two masks agree, and both drop, as often as independent ones."""
    p = applied(p)
    check_counts((a == b).sum(), a.numel(), p**2 + (1.0 - p) ** 2)
    check_counts((a & b).sum(), a.numel(), p**2)


@probabilities
def test_neighbours_are_uncorrelated(p: float) -> None:
    """Elements at a distance, in disjoint pairs as the bound requires, look independent."""
    mask = dropped(1024, 1024, p)
    for m in (mask, mask.t()):
        for distance in (1, 2, 3, 16, 128):
            pairs = m[: 1024 - 1024 % (2 * distance)].unflatten(0, (-1, 2, distance))
            check_independent(pairs[:, 0], pairs[:, 1], p)
        check_independent(m[1:-1:2], m[2::2], p)  # the other pairs of neighbours: odd with the next even
    check_independent(mask[::2, :-1], mask[1::2, 1:], p)  # diagonally


def test_four_corners_are_uncorrelated() -> None:
    """A word mixes the sum of a row key and a column key, yet corners of rectangles look independent."""
    mask = dropped(1024, 1024, 0.5)
    for distance in (1, 2, 8, 64):
        corners = mask.unflatten(1, (-1, 2, distance)).unflatten(0, (-1, 2, distance))
        parity = (
            corners[:, 0, :, :, 0] ^ corners[:, 0, :, :, 1] ^ corners[:, 1, :, :, 0] ^ corners[:, 1, :, :, 1]
        )
        check_counts(parity.sum(), parity.numel(), 0.5)


def test_mixer_passes_strict_avalanche() -> None:
    """Strict avalanche: if any input bit flips, each output bit flips half the time."""
    words = torch.randint(-(2**31), 2**31, (1 << 14,)).to(torch.int32)
    mixed, bits = _mix_(words.clone()), torch.arange(32, dtype=torch.int32)
    for bit in (1 << torch.arange(32)).to(torch.int32):
        flips = (mixed ^ _mix_(words ^ bit))[:, None] >> bits & 1
        assert (flips.double().mean(0) - 0.5).abs().max() < 0.03


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_counts_have_binomial_variance(p: float) -> None:
    mask, n = dropped(1024, 1024, p).double(), 1024
    p = applied(p)
    for axis in (0, 1):
        chi2 = (mask.sum(axis) - n * p).square().sum().item() / (n * p * (1.0 - p))
        assert abs(chi2 - n) < 5.5 * math.sqrt(2.0 * n)  # chi-square of 1024 degrees: nearly normal


def test_pairs_of_rows_and_columns_are_uncorrelated() -> None:
    mask = dropped(512, 512, 0.5)
    for m in (mask, mask.t()):
        signs = 1.0 - 2.0 * m.float()
        first, second = torch.triu_indices(512, 512, offset=1)
        agree = (512 + (signs @ signs.t())[first, second]) / 2
        check_counts(agree, 512, 0.5)


@probabilities
def test_seeds_are_independent(p: float) -> None:
    masks = [dropped(512, 512, p, value) for value in (0, 1, 2, -1, 2**32, 2**63 - 1, -(2**63), 12345)]
    for a, b in itertools.combinations(masks, 2):
        check_independent(a, b, p)
        check_independent(a[1:], b[:-1], p)
        check_independent(a[:, 2:], b[:, :-2], p)


def test_seeds_differ_and_follow_torchs_generator() -> None:
    torch.manual_seed(1)
    first = torch.cat([draw_seed(CPU) for _ in range(100)])
    torch.manual_seed(1)
    assert torch.equal(first, torch.cat([draw_seed(CPU) for _ in range(100)]))
    assert first.unique().numel() == 100
    check_counts((first > 0).sum(), 100, 0.5)
