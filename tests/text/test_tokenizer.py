"""Tokenizers: what is encoded decodes to itself, and a saved one is the same."""

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
def test_bytes_round_trip_any_text(text: str) -> None:
    ids = ByteTokenizer().encode(text)
    assert ids == list(text.encode())
    assert ByteTokenizer().decode(ids) == text


@given(TEXTS.filter(bool), TEXTS)
def test_characters_round_trip_and_are_numbered_in_order(text: str, other: str) -> None:
    tokenizer = CharTokenizer.from_texts([text, other])
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.vocab_size == len(set(text + other))
    assert tokenizer.encode("".join(sorted(set(text + other)))) == list(range(tokenizer.vocab_size))


def test_an_unknown_character_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"^character 'é' \(U\+00E9\) at 3 is not one of the 3 of this tokenizer"
    ):
        CharTokenizer("caf").encode("café")
    with pytest.raises(ValueError, match="token 3 is not among the 3"):
        CharTokenizer("caf").decode([0, 3])
    with pytest.raises(ValueError, match="the text is empty"):
        CharTokenizer.from_texts([""])


def hf_specification() -> str:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "hello": 1, "world": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer.to_str()


def test_a_hugging_face_tokenizer_is_read_from_its_json(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    (tmp_path / "tokenizer.json").write_text(hf_specification())
    tokenizer = make_tokenizer(str(tmp_path / "tokenizer.json"), [])
    assert tokenizer.vocab_size == 3
    assert tokenizer.encode("hello world") == [1, 2]
    assert tokenizer.decode([1, 2]) == "hello world"
    with pytest.raises(ValueError, match=r"not a tokenizer\.json of Hugging Face"):
        HFTokenizer("{}")


def test_no_text_is_cut_short_or_padded() -> None:
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
def test_saved_and_loaded_it_is_the_same(name: str, tmp_path: Path) -> None:
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
def test_other_files_are_refused_by_name(content: str, tmp_path: Path) -> None:
    (tmp_path / "t.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=r"t.json: neither a tokenizer that ffn saved nor"):
        load_tokenizer(tmp_path / "t.json")
    with pytest.raises(ValueError, match=r"absent.json: no such tokenizer file"):
        load_tokenizer(tmp_path / "absent.json")


def test_a_default_prompt_that_cannot_be_encoded_gives_way_and_says_so() -> None:
    said: list[str] = []
    tokenizer = CharTokenizer("abc")
    assert encode_prompt(tokenizer, "cab", 1, said.append) == ("cab", [2, 0, 1])
    assert said == []
    assert encode_prompt(tokenizer, "cabin", 1, said.append) == ("b", [1])
    assert said == ["prompt       'b', how the training text begins: its tokenizer cannot encode 'cabin'"]


def test_the_frame_is_what_the_file_puts_around_a_text() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"[UNK]": 0, "<s>": 1, "</s>": 2, "b": 3}, "[UNK]")
    )
    assert HFTokenizer(made.to_str()).frame() == ([], [])
    special = [("<s>", 1), ("</s>", 2)]
    made.post_processor = tokenizers.processors.TemplateProcessing("<s> $A </s> </s>", special_tokens=special)
    tokenizer = HFTokenizer(made.to_str())
    assert tokenizer.frame() == ([1], [2, 2])
    assert tokenizer.encode("b") == [3], "what is encoded for a corpus has no frame"
    assert tokenizer.number("[PAD]", "</s>", "<s>") == 2
    assert tokenizer.number("[PAD]") is None
