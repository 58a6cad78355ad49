"""Rotary positions: the angles by which attention turns queries and keys, for long windows stretched."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Interpolation:
    """Every position divided by `factor`, for a window that many times longer; rope_type "linear" in configs.

    Source: Chen et al. 2023.
    """

    factor: float = 1.0
    amplitude = 1.0

    def frequencies(self, periods: Tensor, base: float) -> Tensor:
        return 1.0 / periods / self.factor


@dataclass(frozen=True)
class Llama3:
    """Slow turns divided by `factor`, fast ones kept, those between interpolated.

    original: the window of pretraining. low, high: a channel that turns less than `low` times in it is slow,
        one that turns more than `high` times is fast.

    Source: Llama Team 2024 (Llama 3.1).
    """

    factor: float
    original: int
    low: float = 1.0
    high: float = 4.0
    amplitude = 1.0

    def frequencies(self, periods: Tensor, base: float) -> Tensor:
        kept = 1.0 / periods
        wavelengths = 2 * math.pi / kept
        share = (self.original / wavelengths - self.low) / (self.high - self.low)
        between = (1 - share) * kept / self.factor + share * kept
        stretched = torch.where(wavelengths > self.original / self.low, kept / self.factor, between)
        return torch.where(wavelengths < self.original / self.high, kept, stretched)


@dataclass(frozen=True)
class Yarn:
    """As Llama3, with a ramp over the channels' numbers, and cosines and sines times `amplitude`.

    original: the window of pretraining. fast, slow: turns in it at which the ramp begins and ends.
    amplitude: 0.1 ln(factor) + 1 in the paper. whole: whether the ramp begins and ends at whole channels.

    Source: Peng et al. 2023.
    """

    factor: float
    original: int
    amplitude: float
    fast: float = 32.0
    slow: float = 1.0
    whole: bool = True

    def frequencies(self, periods: Tensor, base: float) -> Tensor:
        pairs = periods.shape[-1]
        first, last = self._channel(self.fast, pairs, base), self._channel(self.slow, pairs, base)
        if self.whole:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, 2 * pairs - 1)
        last += 0.001 if first == last else 0.0
        places = torch.arange(pairs, dtype=torch.float32, device=periods.device)
        kept = 1 - ((places - first) / (last - first)).clamp(0, 1)
        return 1.0 / (self.factor * periods) * (1 - kept) + 1.0 / periods * kept

    def _channel(self, turns: float, pairs: int, base: float) -> float:
        """The pair of channels, counted with a fraction, that turns so often in the original window."""
        return 2 * pairs * math.log(self.original / (turns * 2 * math.pi)) / (2 * math.log(base))


Scaling = Interpolation | Llama3 | Yarn


def rotary_tables(
    positions: Tensor, channels: int, base: float = 10_000.0, scaling: Scaling | float = 1.0
) -> tuple[Tensor, Tensor]:
    """cos and signed sin of position * base^(-2i/C), as `ffn.nn.attention.rotate` wants them.

    They are recomputed in each forward, for all layers at once, and never stored: a buffer would be rounded
    by `.to(dtype)` and left empty by `to_empty`.

    Args:
        positions: (T) or (B, T), integers.
        channels: of a head that turn, even; C, or fewer of them. Channel i is paired with channel
            i + channels/2, as Llama's weights are (the paper pairs neighbours).
        base: of the geometric row of frequencies; larger turns slower.
        scaling: how the frequencies are stretched; a number is Interpolation's factor.

    Returns:
        two of (..., T, 1, channels), float32 in any model: [cos, cos] and [-sin, sin].

    Raises:
        ValueError: an odd number of channels.

    Source: Su et al. 2021.
    """
    if channels % 2:
        raise ValueError(
            f"rotary positions turn pairs of channels; head_dim={channels} is odd; choose an even one"
        )
    scaling = Interpolation(scaling) if isinstance(scaling, int | float) else scaling
    places = torch.arange(0, channels, 2, dtype=torch.float32, device=positions.device)
    frequencies = scaling.frequencies(base ** (places / channels), base)
    signed = torch.cat((-frequencies, frequencies))  # cos is even and sin odd: this signs only sin
    angles = positions.to(torch.float32)[..., None, None] * signed
    cos, sin = angles.cos(), angles.sin()
    return (cos, sin) if scaling.amplitude == 1.0 else (cos * scaling.amplitude, sin * scaling.amplitude)
