"""Tokenizers from texts: of every kind, of the size that is asked, with one number for strangers."""

import builtins
from pathlib import Path

import pytest

from ffn.classify.vocabulary import STRANGER, train_tokenizer
from ffn.text.tokenizer import ByteTokenizer, CharTokenizer, HFTokenizer

TEXTS = ["The cat, the dog.", "a cat and a dog", "Ünd ein Hund"] * 3


def test_words_are_lowered_and_parted_from_punctuation() -> None:
    pytest.importorskip("tokenizers")
    tokenizer = train_tokenizer("word", TEXTS, 100)
    assert isinstance(tokenizer, HFTokenizer)
    assert tokenizer.frame() == ([], [])
    cat, dog = tokenizer.encode("CAT"), tokenizer.encode("dog")
    assert tokenizer.encode("Cat , dog.")[0] == cat[0]
    assert len(tokenizer.encode("cat,dog.")) == 4
    assert cat != dog
    assert tokenizer.encode("zebra") == [tokenizer.number("[UNK]")] == [1]
    assert tokenizer.number("[PAD]") == 0
    assert train_tokenizer("word", TEXTS, 5).vocab_size == 5


def test_pairs_of_bytes_encode_anything() -> None:
    pytest.importorskip("tokenizers")
    tokenizer = train_tokenizer("bpe", TEXTS, 300)
    assert tokenizer.vocab_size <= 300
    for text in ("the cat", "日本 🙂"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("a cat and a dog")) < 15
    with pytest.raises(ValueError, match=r"^model.vocab_size=200: bpe wants 259 or more$"):
        train_tokenizer("bpe", TEXTS, 200)


@pytest.mark.parametrize("kind", ["word", "bpe"])
def test_a_start_token_stands_before_each_text(kind: str) -> None:
    pytest.importorskip("tokenizers")
    tokenizer = train_tokenizer(kind, TEXTS, 400, start=True)
    assert isinstance(tokenizer, HFTokenizer)
    assert tokenizer.frame() == ([2], [])
    assert tokenizer.encode("cat")[0] != 2


def test_characters_that_occur_twice_and_one_for_the_others() -> None:
    tokenizer = train_tokenizer("char", ["aab", "ba", "c"], 100)
    assert isinstance(tokenizer, CharTokenizer)
    assert tokenizer.vocabulary == "ab" + STRANGER
    assert train_tokenizer("char", ["aab", "ba", "c"], 2).vocab_size == 2


def test_bytes_and_files_and_nothing_else(tmp_path: Path) -> None:
    assert isinstance(train_tokenizer("byte", [], 1), ByteTokenizer)
    CharTokenizer("xyz").save(tmp_path / "t.json")
    assert train_tokenizer(str(tmp_path / "t.json"), [], 1).vocab_size == 3
    with pytest.raises(
        ValueError, match=r"^data.tokenizer=words: want word, bpe, char, byte, or the path of"
    ):
        train_tokenizer("words", TEXTS, 100)


def test_without_the_package_a_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def without(name: str, *args, real=builtins.__import__, **kwargs):
        if name == "tokenizers":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"data.tokenizer=word needs tokenizers: pip install"):
        train_tokenizer("word", TEXTS, 100)
