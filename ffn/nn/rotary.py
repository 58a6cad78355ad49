"""Rotary positions: the cos and sin tables that rotate queries and keys, with scaling for longer windows."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Interpolation:
    """Divide every position by `factor`, for a window `factor` times as long; scaling="linear" in configs.

    Source: Chen et al. 2023.
    """

    factor: float = 1.0
    amplitude = 1.0

    def frequencies(self, periods: Tensor, base: float) -> Tensor:
        return 1.0 / periods / self.factor


@dataclass(frozen=True)
class Llama3:
    """Divide low frequencies by `factor`, keep high ones, and interpolate in between.

    Args:
        factor: divides low frequencies.
        original: the window of pretraining.
        low: a channel that rotates fewer times in that window has a low frequency.
        high: a channel that rotates more times in that window has a high frequency.

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
    """As Llama3, with a ramp over the channel index, and cos and sin scaled by `amplitude`.

    Args:
        factor: divides low frequencies.
        original: the window of pretraining.
        amplitude: 0.1 ln(factor) + 1 in the paper.
        fast, slow: rotations in the original window at which the ramp begins and ends.
        whole: True if the ramp begins and ends at whole channels.

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
        """Return the index, with a fraction, of the channel pair that rotates so often in that window."""
        return 2 * pairs * math.log(self.original / (turns * 2 * math.pi)) / (2 * math.log(base))


Scaling = Interpolation | Llama3 | Yarn
UNSCALED = Interpolation()


def rotary_tables(
    positions: Tensor, channels: int, base: float = 10_000.0, scaling: Scaling = UNSCALED
) -> tuple[Tensor, Tensor]:
    """Return cos and signed sin of position * base^(-2i/channels), for `ffn.nn.attention.rotate`.

    The tables are recomputed in each forward, once for all layers. They are no buffers, since `.to(dtype)`
    would round those and `to_empty` would leave them empty.

    Args:
        positions: (T) or (B, T), integers.
        channels: the number of channels of a head that rotate, even and at most C. Channel i is paired with
            channel i + channels/2, as in Llama's weights (the paper pairs neighbors).
        base: of the frequencies, a geometric sequence; a larger base rotates more slowly.
        scaling: of the frequencies; by default none.

    Returns:
        two float32 tables (..., T, 1, channels): [cos, cos] and [-sin, sin].

    Raises:
        ValueError: channels is odd.

    Source: Su et al. 2021.
    """
    if channels % 2:
        raise ValueError(f"channels must be even, since they rotate in pairs, got {channels}")
    places = torch.arange(0, channels, 2, dtype=torch.float32, device=positions.device)
    frequencies = scaling.frequencies(base ** (places / channels), base)
    signed = torch.cat((-frequencies, frequencies))  # cos is even and sin odd: this signs only sin
    angles = positions.to(torch.float32)[..., None, None] * signed
    cos, sin = angles.cos(), angles.sin()
    return (cos, sin) if scaling.amplitude == 1.0 else (cos * scaling.amplitude, sin * scaling.amplitude)
