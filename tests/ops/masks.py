"""Dropout masks and a statistical test of their counts.

The masks are drawn from fixed seeds, so a test always passes or always fails. Truly random masks would fail
it once in a million: the Chernoff bound, P(share of n as far off as q) <= 2 exp(-n KL(q || p)).
"""

import math

import torch
from torch import Tensor

from ffn.ops.dropout_mask import noise

PROBABILITIES = [0.003, 0.1, 1 / 3, 0.5, 0.9]


def dropped(rows: int, cols: int, p: float, seed: int = 0) -> Tensor:
    return noise(torch.tensor([seed]), rows, cols, p, torch.float32) == 0.0


def applied(p: float) -> float:
    """Return p rounded to a 16-bit threshold: the probability that is applied."""
    return round(p * 65536) / 65536


def check_counts(counts: Tensor, n: int, p: float) -> None:
    """Assert that each count is plausible for n trials of probability p."""
    q = counts.double() / n
    divergence = torch.xlogy(q, q / p) + torch.xlogy(1.0 - q, (1.0 - q) / (1.0 - p))
    assert n * divergence.max().item() <= math.log(2e6 * counts.numel())
