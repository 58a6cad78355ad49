"""Text to token numbers and back: bytes, characters, or a Hugging Face `tokenizer.json`.

    tokenizer = CharTokenizer.from_texts(["hello"])
    tokenizer.decode(tokenizer.encode("hello")) == "hello"

`save` writes one JSON file. `load_tokenizer` reads it, and a Hugging Face `tokenizer.json` too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

from ffn.files.atomic import write_file


class Tokenizer(Protocol):
    """The interface that data, training and generation use."""

    @property
    def vocab_size(self) -> int:
        """V: token numbers are 0 to V - 1."""
        ...

    def encode(self, text: str) -> list[int]:
        """Return the token numbers of a text."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of token numbers."""
        ...

    def save(self, path: str | Path) -> None:
        """Write the tokenizer as one JSON file."""
        ...


class ByteTokenizer:
    """One token per byte of the UTF-8 text; V = 256. Every text can be encoded."""

    vocab_size = 256

    def encode(self, text: str) -> list[int]:
        """Return the bytes of the text as numbers."""
        return list(text.encode())

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of the bytes; bytes that are not UTF-8 become U+FFFD."""
        return bytes(ids).decode(errors="replace")

    def save(self, path: str | Path) -> None:
        """Write `{"kind": "byte"}`."""
        _write(path, {"kind": "byte"})


class CharTokenizer:
    """One token per character of a vocabulary, numbered in the order of the code points.

    `encode` raises ValueError for a character outside the vocabulary.
    """

    def __init__(self, vocabulary: Iterable[str]) -> None:
        self.vocabulary = "".join(sorted(set(vocabulary)))
        self._numbers = {character: number for number, character in enumerate(self.vocabulary)}
        if not self.vocabulary:
            raise ValueError("vocabulary must hold at least one character; the text is empty")

    @classmethod
    def from_texts(cls, texts: Iterable[str]) -> CharTokenizer:
        """Build the vocabulary from the characters of the texts."""
        found: set[str] = set()
        for text in texts:
            found.update(text)
        return cls(found)

    @property
    def vocab_size(self) -> int:
        """V: the number of different characters."""
        return len(self.vocabulary)

    def encode(self, text: str) -> list[int]:
        """Return the numbers of the characters; ValueError for a character outside the vocabulary."""
        numbers = self._numbers
        try:
            return [numbers[character] for character in text]
        except KeyError as error:
            character = error.args[0]
            raise ValueError(
                f"character {character!r} (U+{ord(character):04X}) at {text.index(character)} is not one of "
                f"the {self.vocab_size} of this tokenizer; "
                "data.tokenizer=byte encodes any text; with --from, give a base that was trained with it"
            ) from None

    def decode(self, ids: Iterable[int]) -> str:
        """Return the characters of the numbers; ValueError for a number outside the vocabulary."""
        numbers = list(ids)
        wrong = [number for number in numbers if not 0 <= number < self.vocab_size]
        if wrong:
            raise ValueError(f"ids must be in 0..{self.vocab_size - 1}, got {wrong[0]}")
        return "".join(self.vocabulary[number] for number in numbers)

    def save(self, path: str | Path) -> None:
        """Write the vocabulary."""
        _write(path, {"kind": "char", "vocabulary": self.vocabulary})


class HFTokenizer:
    """A Hugging Face fast tokenizer. Requires the package `tokenizers`.

    No special tokens are added, since a corpus is a stream and a prompt continues it. Truncation and padding
    are off, whatever the file says.

    Args:
        specification: the text of a `tokenizer.json`.
    """

    def __init__(self, specification: str) -> None:
        try:
            from tokenizers import Tokenizer as FastTokenizer
        except ImportError:
            raise ImportError(
                "a tokenizer.json requires the package tokenizers: pip install 'torch-ffn[hf]'"
            ) from None
        try:
            self._tokenizer = FastTokenizer.from_str(specification)
        except Exception as error:  # noqa: BLE001 - the package raises bare Exception
            raise ValueError(f"not a Hugging Face tokenizer.json: {error}") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.specification = specification

    @property
    def vocab_size(self) -> int:
        """V: one more than the largest token number, added tokens included."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str) -> list[int]:
        """Return the token numbers of a text."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def frame(self) -> tuple[list[int], list[int]]:
        """Return the special tokens that the file puts before and after a text, which classifiers need."""
        found = self._tokenizer.encode("a")
        special = found.special_tokens_mask
        first = special.index(0) if 0 in special else len(special)
        last = len(special) - special[::-1].index(0) if 0 in special else len(special)
        return found.ids[:first], found.ids[last:]

    def number(self, *spellings: str) -> int | None:
        """Return the number of the first of these tokens that exists; None if none does."""
        numbers = map(self._tokenizer.token_to_id, spellings)
        return next((number for number in numbers if number is not None), None)

    def spelling(self, number: int) -> str | None:
        """Return a token's string, special tokens included; None for a number without a token."""
        return self._tokenizer.id_to_token(number)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of token numbers without special tokens."""
        return self._tokenizer.decode(list(ids))

    def save(self, path: str | Path) -> None:
        """Write the whole specification."""
        _write(path, {"kind": "hf", "tokenizer": json.loads(self.specification)})


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a file that `save` wrote or a Hugging Face `tokenizer.json`; ValueError for any other."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such tokenizer file")
    try:
        content = json.loads(path.read_text("utf-8"))
        kind = content.get("kind", "hf" if "model" in content else None)
        if kind == "byte":
            return ByteTokenizer()
        if kind == "char":
            return CharTokenizer(content["vocabulary"])
        if kind == "hf":
            return HFTokenizer(json.dumps(content.get("tokenizer", content)))
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, KeyError, TypeError):
        pass
    raise ValueError(f"{path}: neither a tokenizer that ffn saved nor a tokenizer.json of Hugging Face")


def make_tokenizer(name: str, texts: Iterable[str]) -> Tokenizer:
    """Return the tokenizer for a corpus.

    Args:
        name: "byte", "char" (the characters of the texts), or the path of a tokenizer's file.
    """
    if name == "byte":
        return ByteTokenizer()
    if name == "char":
        return CharTokenizer.from_texts(texts)
    return load_tokenizer(name)


def encode_prompt(
    tokenizer: Tokenizer, prompt: str, first: int, say: Callable[[str], None]
) -> tuple[str, list[int]]:
    """Return a default prompt and its tokens; if it cannot be encoded, the token `first`, and tell `say`."""
    try:
        if tokens := tokenizer.encode(prompt):
            return prompt, tokens
    except ValueError:  # a character outside the vocabulary
        pass
    text = tokenizer.decode([first])
    say(f"prompt       {text!r}, how the training text begins: its tokenizer cannot encode {prompt!r}")
    return text, [first]


def _write(path: str | Path, content: dict[str, Any]) -> None:
    write_file(Path(path), json.dumps(content, ensure_ascii=False, indent=1) + "\n")
