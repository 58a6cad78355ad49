"""The embedding: its formula and its errors."""

import pytest
import torch
from torch import nn

from ffn.nn.embedding import Embedding

F64 = torch.float64


def test_output_is_the_token_row_plus_the_position_row() -> None:
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


def test_dropout_only_in_training() -> None:
    embedding = Embedding(11, 64, dropout=0.5)
    tokens = torch.randint(11, (2, 9))
    dropped = (embedding(tokens) == 0).double().mean().item()
    assert 0.4 < dropped < 0.6
    assert not (embedding.eval()(tokens) == 0).any()


@pytest.mark.parametrize(
    ("tokens", "low", "high"), [([[1, 11]], 1, 11), ([[-1, 2]], -1, 2)], ids=["high", "negative"]
)
def test_token_outside_the_vocabulary_raises(tokens: list, low: int, high: int) -> None:
    with pytest.raises(ValueError, match=rf"^tokens .*got {low} to {high}"):
        Embedding(11, 6)(torch.tensor(tokens))


def test_position_beyond_the_table_raises() -> None:
    with pytest.raises(ValueError, match=r"^positions .*got 0 to 4"):
        Embedding(11, 6, 4)(torch.zeros(1, 5, dtype=torch.int64))


def test_tokens_must_be_integers() -> None:
    assert Embedding(11, 6)(torch.zeros(1, 2, dtype=torch.int32)).shape == (1, 2, 6)
    with pytest.raises(TypeError, match=r"^tokens must be "):
        Embedding(11, 6)(torch.zeros(1, 2))


def test_embedding_with_all_options_equals_its_formula() -> None:
    embedding = Embedding(
        11,
        6,
        5,
        position_offset=2,
        num_token_types=3,
        scale=2.5,
        norm=lambda: nn.LayerNorm(6, dtype=F64),
        dtype=F64,
    )
    tokens, types = torch.tensor([[3, 0, 10], [1, 1, 2]]), torch.tensor([[0, 1, 2], [2, 0, 0]])
    assert embedding.position.weight.shape == (7, 6)
    position = embedding.position.weight[torch.tensor([2, 3, 4])]
    for given, kind in ((None, 0), (types, types)):
        x = 2.5 * embedding.token.weight[tokens] + embedding.token_type.weight[kind] + position
        torch.testing.assert_close(embedding(tokens, token_types=given), embedding.norm(x))
    with pytest.raises(ValueError, match=r"^token_types .*got 0 to 3"):
        embedding(tokens, token_types=types + (types == 2))


def test_token_types_without_a_table_raise() -> None:
    tokens = torch.zeros(1, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"^token_types"):
        Embedding(11, 6)(tokens, token_types=tokens)


def test_scale_is_rounded_to_the_weights_dtype() -> None:
    embedding = Embedding(11, 6, scale=3072**0.5, dtype=torch.bfloat16)
    tokens = torch.arange(11)[None]
    assert torch.equal(embedding(tokens), embedding.token.weight[tokens] * 55.5)
