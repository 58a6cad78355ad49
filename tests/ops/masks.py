"""Masks of dropout, and whether counts taken from them may be those of truly random ones.

The masks are drawn from fixed seeds, so a test passes always or never. The bound is one that truly random
masks would miss once in a million: Chernoff's, P(share of n as far off as q) <= 2 exp(-n KL(q || p)).
"""

import math

import torch
from torch import Tensor

from ffn.ops.dropout_mask import noise

PROBABILITIES = [0.003, 0.1, 1 / 3, 0.5, 0.9]


def dropped(rows: int, cols: int, p: float, seed: int = 0) -> Tensor:
    return noise(torch.tensor([seed]), rows, cols, p, torch.float32) == 0.0


def applied(p: float) -> float:
    """The probability that a 16-bit threshold can express."""
    return round(p * 65536) / 65536


def check_counts(counts: Tensor, n: int, p: float) -> None:
    """That all these counts may be those of n trials of probability p each."""
    q = counts.double() / n
    divergence = torch.xlogy(q, q / p) + torch.xlogy(1.0 - q, (1.0 - q) / (1.0 - p))
    assert n * divergence.max().item() <= math.log(2e6 * counts.numel())
