"""Tokenizers: decoding inverts encoding, and a saved tokenizer loads as it was."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ffn.text.tokenizer import (
    ByteTokenizer,
    CharTokenizer,
    HFTokenizer,
    encode_prompt,
    load_tokenizer,
    make_tokenizer,
)

TEXTS = st.text(st.characters(exclude_categories=["Cs"]))


@given(TEXTS)
def test_byte_tokenizer_round_trip(text: str) -> None:
    ids = ByteTokenizer().encode(text)
    assert ids == list(text.encode())
    assert ByteTokenizer().decode(ids) == text


@given(TEXTS.filter(bool), TEXTS)
def test_char_tokenizer_round_trip_and_order(text: str, other: str) -> None:
    tokenizer = CharTokenizer.from_texts([text, other])
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.vocab_size == len(set(text + other))
    assert tokenizer.encode("".join(sorted(set(text + other)))) == list(range(tokenizer.vocab_size))


def test_unknown_characters_and_ids_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^character 'é' \(U\+00E9\) at 3 "):
        CharTokenizer("caf").encode("café")
    with pytest.raises(ValueError, match=r"^ids .* 3$"):
        CharTokenizer("caf").decode([0, 3])
    with pytest.raises(ValueError, match=r"^vocabulary"):
        CharTokenizer.from_texts([""])


def hf_specification() -> str:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "hello": 1, "world": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer.to_str()


def test_a_hugging_face_tokenizer_is_read(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    (tmp_path / "tokenizer.json").write_text(hf_specification())
    tokenizer = make_tokenizer(str(tmp_path / "tokenizer.json"), [])
    assert tokenizer.vocab_size == 3
    assert tokenizer.encode("hello world") == [1, 2]
    assert tokenizer.decode([1, 2]) == "hello world"
    with pytest.raises(ValueError, match=r"not a Hugging Face tokenizer\.json"):
        HFTokenizer("{}")


def test_truncation_and_padding_are_off() -> None:
    pytest.importorskip("tokenizers")
    limits = json.loads(hf_specification())
    limits["truncation"] = {"max_length": 2, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    limits["padding"] = {"strategy": {"Fixed": 4}, "direction": "Right", "pad_to_multiple_of": None}
    limits["padding"] |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "<unk>"}
    tokenizer = HFTokenizer(json.dumps(limits))
    assert tokenizer.encode("hello") == [1]
    assert tokenizer.encode("hello world hello") == [1, 2, 1]
    assert json.loads(tokenizer.specification) == limits


@pytest.mark.parametrize("name", ["byte", "char", "hf"])
def test_a_saved_tokenizer_loads_as_it_was(name: str, tmp_path: Path) -> None:
    if name == "hf":
        pytest.importorskip("tokenizers")
        tokenizer = HFTokenizer(hf_specification())
    else:
        tokenizer = make_tokenizer(name, ["hello ", "world\u2028"])
    tokenizer.save(tmp_path / "t.json")
    again = load_tokenizer(tmp_path / "t.json")
    assert type(again) is type(tokenizer)
    assert again.vocab_size == tokenizer.vocab_size
    assert again.encode("hello world") == tokenizer.encode("hello world")
    again.save(tmp_path / "u.json")
    assert (tmp_path / "t.json").read_bytes() == (tmp_path / "u.json").read_bytes()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    "content", ["", "[1]", "{}", json.dumps({"kind": "char"}), json.dumps({"kind": "new"}), "\xff"]
)
def test_other_files_are_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "t.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=r"t.json: neither"):
        load_tokenizer(tmp_path / "t.json")
    with pytest.raises(ValueError, match=r"absent.json: no such tokenizer file"):
        load_tokenizer(tmp_path / "absent.json")


def test_encode_prompt_replaces_a_prompt_that_cannot_be_encoded() -> None:
    said: list[str] = []
    tokenizer = CharTokenizer("abc")
    assert encode_prompt(tokenizer, "cab", 1, said.append) == ("cab", [2, 0, 1])
    assert said == []
    assert encode_prompt(tokenizer, "cabin", 1, said.append) == ("b", [1])
    assert len(said) == 1
    assert "'cabin'" in said[0]


def test_frame_returns_the_special_tokens_around_a_text() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"[UNK]": 0, "<s>": 1, "</s>": 2, "b": 3}, "[UNK]")
    )
    assert HFTokenizer(made.to_str()).frame() == ([], [])
    special = [("<s>", 1), ("</s>", 2)]
    made.post_processor = tokenizers.processors.TemplateProcessing("<s> $A </s> </s>", special_tokens=special)
    tokenizer = HFTokenizer(made.to_str())
    assert tokenizer.frame() == ([1], [2, 2])
    assert tokenizer.encode("b") == [3], "encode adds no special tokens"
    assert tokenizer.number("[PAD]", "</s>", "<s>") == 2
    assert tokenizer.number("[PAD]") is None
