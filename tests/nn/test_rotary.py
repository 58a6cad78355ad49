"""Rotations know only how far apart two positions are; stretched ones are fast or slow."""

import math

import pytest
import torch
from torch import Tensor

from ffn.nn.attention import rotate
from ffn.nn.rotary import Interpolation, Llama3, Yarn, rotary_tables

F64 = torch.float64


def turned(x: Tensor, base: float = 10_000.0) -> Tensor:
    """Channels i and i + C/2 of x (B, T, Q, C) are one complex number, turned by t base^(-2i/C) at t."""
    T, C = x.shape[1], x.shape[3]
    angles = torch.arange(T)[:, None] * base ** (-torch.arange(0, C, 2, dtype=F64) / C)
    z = torch.complex(*x.chunk(2, -1)) * torch.exp(1j * angles)[:, None]
    return torch.cat((z.real, z.imag), -1)


def test_rotation_written_out() -> None:
    cos, sin = rotary_tables(torch.arange(5), 4, 100.0)
    x = torch.randn(2, 5, 3, 4, dtype=F64)
    out = rotate(x, cos, sin)
    assert cos.dtype == sin.dtype == torch.float32
    assert out.dtype == F64
    torch.testing.assert_close(out, turned(x, 100.0), atol=1e-5, rtol=1e-5)


def test_scores_depend_on_the_distance_alone() -> None:
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=F64)

    def score(m: int, n: int) -> float:
        turned_q, turned_k = (rotate(x, *rotary_tables(torch.tensor([p]), 16)) for x, p in ((q, m), (k, n)))
        return (turned_q * turned_k).sum().item()

    for shift in (1, 17, 200):
        assert math.isclose(score(5, 2), score(5 + shift, 2 + shift), abs_tol=1e-4)
    assert not math.isclose(score(5, 2), score(5, 3), abs_tol=1e-2)
    assert math.isclose(score(0, 0), (q * k).sum().item(), abs_tol=1e-9)


def test_scaling_divides_positions_and_base_slows_down() -> None:
    near, far = torch.arange(8), torch.arange(0, 32, 4)
    torch.testing.assert_close(rotary_tables(far, 8, scaling=Interpolation(4.0)), rotary_tables(near, 8))
    cos, _ = rotary_tables(near, 2, base=5.0)
    torch.testing.assert_close(cos[:, 0, 0], torch.arange(8.0).cos())  # one pair turns by 1 whatever the base
    slow, fast = (rotary_tables(torch.tensor([1]), 8, base)[0][0, 0] for base in (1e6, 1e2))
    assert (slow[1:4] > fast[1:4]).all()


def test_rotations_keep_lengths_and_can_be_batched() -> None:
    positions = torch.tensor([[0, 3, 4], [7, 0, 1]])
    cos, sin = rotary_tables(positions, 6)
    assert cos.shape == sin.shape == (2, 3, 1, 6)
    x = torch.randn(2, 3, 4, 6)
    out = rotate(x, cos, sin)
    torch.testing.assert_close(out.norm(dim=-1), x.norm(dim=-1))
    for b in range(2):
        torch.testing.assert_close(out[b : b + 1], rotate(x[b : b + 1], *rotary_tables(positions[b], 6)))


def test_odd_channels_cannot_be_paired() -> None:
    with pytest.raises(ValueError, match=r"^channels\b.*7"):
        rotary_tables(torch.arange(3), 7)


@pytest.mark.parametrize("base", [10_000.0, 500_000.0])
def test_frequencies_are_exact_to_float32(base: float) -> None:
    half = 64
    exact = base ** (-torch.arange(half, dtype=F64) / half)
    _, signed_sin = rotary_tables(torch.tensor([1]), 2 * half, base)
    torch.testing.assert_close(signed_sin[0, 0, half:].double(), exact.sin(), rtol=1e-6, atol=0.0)


def frequencies(scaling, base: float = 10_000.0) -> torch.Tensor:
    _, sin = rotary_tables(torch.tensor([1]), 32, base, scaling)
    return sin[0, 0, 16:].asin()


def test_llama3_keeps_fast_turns_and_divides_slow_ones() -> None:
    plain, stretched = frequencies(Interpolation()), frequencies(Llama3(8.0, original=256))
    wavelengths = 2 * math.pi / plain
    fast, slow = wavelengths < 64, wavelengths > 256
    assert fast.any() and slow.any() and not (fast | slow).all()  # noqa: PT018
    torch.testing.assert_close(stretched[fast], plain[fast])
    torch.testing.assert_close(stretched[slow], plain[slow] / 8.0)
    between = ~(fast | slow)
    assert ((plain / 8.0 < stretched) & (stretched < plain))[between].all()


@pytest.mark.parametrize("whole", [True, False])
def test_yarn_ramps_over_the_channels(whole: bool) -> None:
    plain = frequencies(Interpolation())
    scaling = Yarn(4.0, original=256, amplitude=1.0, fast=16.0, slow=1.0, whole=whole)
    stretched = frequencies(scaling)
    turns = 256 * plain / (2 * math.pi)
    torch.testing.assert_close(stretched[turns > 20], plain[turns > 20])
    torch.testing.assert_close(stretched[turns < 0.5], plain[turns < 0.5] / 4.0)
    assert (stretched / plain).diff().le(1e-6).all()  # never back


def test_yarn_amplifies_both_tables() -> None:
    positions = torch.arange(5)
    plain = rotary_tables(positions, 8, scaling=Yarn(4.0, 16, amplitude=1.0))
    loud = rotary_tables(positions, 8, scaling=Yarn(4.0, 16, amplitude=1.5))
    for table, other in zip(plain, loud, strict=True):
        torch.testing.assert_close(1.5 * table, other)


def test_some_channels_stay() -> None:
    x = torch.randn(2, 5, 3, 8, dtype=F64)
    tables = rotary_tables(torch.arange(5), 4)
    out = rotate(x, *tables)
    assert torch.equal(out[..., 4:], x[..., 4:])
    assert torch.equal(out[..., :4], rotate(x[..., :4], *tables))
