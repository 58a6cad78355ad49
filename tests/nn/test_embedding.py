"""Tables and angles: what a row is, and that rotations know only how far apart two positions are."""

import math

import pytest
import torch

from ffn.nn.attention import rotate
from ffn.nn.embedding import Embedding, rotary_tables

F64 = torch.float64


def test_a_token_is_a_row_and_a_position_another() -> None:
    embedding = Embedding(11, 6, 5, dtype=F64)
    tokens = torch.tensor([[3, 0, 10], [1, 1, 2]])
    tokens_table, positions_table = embedding.token.weight, embedding.position.weight
    torch.testing.assert_close(embedding(tokens), tokens_table[tokens] + positions_table[:3])
    positions = torch.tensor([[4, 0, 1], [2, 2, 3]])
    torch.testing.assert_close(
        embedding(tokens, positions), tokens_table[tokens] + positions_table[positions]
    )
    assert list(embedding.state_dict()) == ["token.weight", "position.weight"]
    assert list(Embedding(11, 6).state_dict()) == ["token.weight"]
    assert Embedding(11, 6).weight.shape == (11, 6)


def test_dropout_while_training_only() -> None:
    embedding = Embedding(11, 64, dropout=0.5)
    tokens = torch.randint(11, (2, 9))
    dropped = (embedding(tokens) == 0).double().mean().item()
    assert 0.4 < dropped < 0.6
    assert not (embedding.eval()(tokens) == 0).any()


@pytest.mark.parametrize(
    ("tokens", "low", "high"), [([[1, 11]], 1, 11), ([[-1, 2]], -1, 2)], ids=["high", "negative"]
)
def test_a_token_outside_the_vocabulary(tokens: list, low: int, high: int) -> None:
    with pytest.raises(ValueError, match=rf"^tokens want 0 <= index < 11; got {low} to {high}; check .*$"):
        Embedding(11, 6)(torch.tensor(tokens))


def test_a_position_outside_the_window() -> None:
    with pytest.raises(ValueError, match="positions want 0 <= index < 4; got 0 to 4"):
        Embedding(11, 6, 4)(torch.zeros(1, 5, dtype=torch.int64))


def test_tokens_must_be_integers() -> None:
    assert Embedding(11, 6)(torch.zeros(1, 2, dtype=torch.int32)).shape == (1, 2, 6)
    with pytest.raises(TypeError, match=r"tokens want int64 or int32; got float32; cast with .long\(\)"):
        Embedding(11, 6)(torch.zeros(1, 2))


def test_rotation_written_out() -> None:
    cos, sin = rotary_tables(torch.arange(5), 4, 100.0)
    x = torch.randn(2, 5, 3, 4, dtype=F64)
    out = rotate(x, cos, sin)
    assert cos.dtype == sin.dtype == torch.float32
    assert out.dtype == F64
    for t in range(5):
        for i, frequency in enumerate((1.0, 100.0**-0.5)):
            a, b = x[:, t, :, i], x[:, t, :, i + 2]
            c, s = math.cos(t * frequency), math.sin(t * frequency)
            torch.testing.assert_close(out[:, t, :, i], a * c - b * s, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(out[:, t, :, i + 2], b * c + a * s, atol=1e-5, rtol=1e-5)


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
    torch.testing.assert_close(rotary_tables(far, 8, scaling=4.0), rotary_tables(near, 8))
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
    with pytest.raises(ValueError, match="head_dim=7 is odd; choose an even one"):
        rotary_tables(torch.arange(3), 7)


@pytest.mark.parametrize("base", [10_000.0, 500_000.0])
def test_frequencies_are_exact_to_float32(base: float) -> None:
    half = 64
    exact = base ** (-torch.arange(half, dtype=F64) / half)
    _, signed_sin = rotary_tables(torch.tensor([1]), 2 * half, base)
    torch.testing.assert_close(signed_sin[0, 0, half:].double(), exact.sin(), rtol=1e-6, atol=0.0)
