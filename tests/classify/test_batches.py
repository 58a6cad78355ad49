"""Texts are truncated between special tokens and padded on the right; each row occurs once per epoch."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ffn.classify.batches import TextEncoder, batches, collate
from ffn.classify.vocabulary import STRANGER, train_tokenizer
from ffn.text.tokenizer import ByteTokenizer, CharTokenizer, HFTokenizer


def framed() -> HFTokenizer:
    """[CLS] words [SEP], as in BERT."""
    pytest.importorskip("tokenizers")
    made = json.loads(train_tokenizer("word", ["one two three"] * 2, 50, start=True).specification)  # type: ignore
    made["added_tokens"].append({**made["added_tokens"][2], "id": 6, "content": "[SEP]"})
    made["model"]["vocab"]["[SEP]"] = 6
    processor = made["post_processor"]
    processor["single"].append({"SpecialToken": {"id": "[SEP]", "type_id": 0}})
    processor["special_tokens"]["[SEP]"] = {"id": "[SEP]", "ids": [6], "tokens": ["[SEP]"]}
    return HFTokenizer(json.dumps(made))


def test_special_tokens_survive_truncation() -> None:
    encode = TextEncoder(framed(), 4)
    assert (encode.prefix, encode.suffix, encode.pad, encode.room) == ([2], [6], 0, 2)
    rows, cut = encode(["one", "one two three", "one two"])
    assert [len(row) for row in rows] == [3, 4, 4]
    assert cut == 1
    assert all(row[0] == 2 and row[-1] == 6 for row in rows)
    with pytest.raises(ValueError, match=r"^window=2"):
        TextEncoder(framed(), 2)


def test_a_text_without_tokens_is_one_unknown_token() -> None:
    assert TextEncoder(framed(), 9)([" "])[0] == [[2, 1, 6]]
    assert TextEncoder(ByteTokenizer(), 9)([""])[0] == [[0]]


def test_unknown_characters_share_one_id() -> None:
    encode = TextEncoder(CharTokenizer("ab" + STRANGER), 9)
    assert encode(["aéb🙂"])[0] == [[0, 2, 1, 2]]
    with pytest.raises(ValueError, match="character 'é'"):
        TextEncoder(CharTokenizer("ab"), 9)(["aé"])


def test_pad_overrides_the_padding_of_the_tokenizer() -> None:
    assert TextEncoder(framed(), 9, pad=5).pad == 5
    assert TextEncoder(framed(), 9, pad=0).pad == 0


@given(st.lists(st.integers(1, 30), min_size=1, max_size=300), st.integers(1, 40), st.integers(0, 3))
def test_batches_hold_every_row_once_and_are_full(lengths: list[int], size: int, seed: int) -> None:
    for generator in (None, torch.Generator().manual_seed(seed)):
        found = batches(lengths, size, generator)
        assert sorted(row for batch in found for row in batch) == list(range(len(lengths)))
        assert len(found) == -(-len(lengths) // size)
        assert all(len(batch) <= size for batch in found)
    again = batches(lengths, size, torch.Generator().manual_seed(seed))
    assert found == again


@pytest.mark.parametrize(("count", "wasted"), [(2000, 0.1), (400, 0.2)])
def test_batches_waste_little_padding_and_differ_each_epoch(count: int, wasted: float) -> None:
    lengths = (torch.randperm(count) % 100 + 1).tolist()
    found = batches(lengths, 20, torch.Generator().manual_seed(0))
    padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in found)
    assert padded < (1 + wasted) * sum(lengths)
    other = batches(lengths, 20, torch.Generator().manual_seed(1))
    nearest = [max(len({*batch} & {*before}) for before in other) for batch in found]
    assert sum(nearest) / len(nearest) < 12, "about half of twenty rows shared a batch before"


@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=6), min_size=1, max_size=5))
def test_batches_are_padded_on_the_right(rows: list[list[int]]) -> None:
    tokens, mask = collate(rows, 0)
    assert tokens.dtype == torch.int64
    assert tokens.shape == (len(rows), max(map(len, rows)))
    assert (mask is None) == (len({len(row) for row in rows}) == 1)
    real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
    assert [row[keep].tolist() for row, keep in zip(tokens, real, strict=True)] == rows
    assert not tokens[~real].any()


def test_word_dropout_keeps_special_tokens_and_one_word() -> None:
    encode, generator = TextEncoder(framed(), 40), torch.Generator().manual_seed(0)
    row = encode(["one two three one two three one two"])[0][0]
    lengths = []
    for _ in range(300):
        dropped = encode.drop_words(row, 0.25, generator)
        assert (dropped[0], dropped[-1]) == (2, 6)
        rest = iter(row)
        assert all(number in rest for number in dropped), "kept tokens keep their order"
        lengths.append(len(dropped) - 2)
    assert min(lengths) >= 1
    assert 5.7 < sum(lengths) / 300 < 6.3
    assert all(len(encode.drop_words(row, 0.999, generator)) >= 3 for _ in range(50))
