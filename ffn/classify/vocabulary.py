"""Tokenizers made from the training texts: whole words, byte pairs, characters or bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ffn.text.tokenizer import ByteTokenizer, CharTokenizer, HFTokenizer, Tokenizer, load_tokenizer

PAD, UNKNOWN, START = "[PAD]", "[UNK]", "[CLS]"
STRANGER = "\N{REPLACEMENT CHARACTER}"  # stands for characters outside a vocabulary
KINDS = ("word", "bpe", "char", "byte")


def train_tokenizer(kind: str, texts: Iterable[str], vocab_size: int, *, start: bool = False) -> Tokenizer:
    """A tokenizer from texts, or from the path of a file.

    Args:
        kind: "word" (lower case, blanks and punctuation part words) and "bpe" (pairs of bytes, merged) want
            the package tokenizers; "char" takes the characters that occur twice or more; "byte" takes nothing
            from the texts. Anything else is the path of a tokenizer's file.
        vocab_size: how many entries at most.
        start: put [CLS] before each text ("word" and "bpe"), for a classifier that reads its first token.

    Raises:
        ValueError: texts without a word or character; a vocabulary that is too small; a file that is none.
        ImportError: the package is absent.
    """
    if kind == "byte":
        return ByteTokenizer()
    if kind == "char":
        counts = Counter(character for text in texts for character in text)
        often = [character for character, count in counts.most_common(vocab_size - 1) if count > 1]
        return CharTokenizer([*often, STRANGER])
    if kind in KINDS:
        return _train(kind, texts, vocab_size, start)
    if not Path(kind).exists():
        raise ValueError(f"data.tokenizer={kind}: want {', '.join(KINDS)}, or the path of a tokenizer.json")
    return load_tokenizer(kind)


def _train(kind: str, texts: Iterable[str], vocab_size: int, start: bool) -> HFTokenizer:
    try:
        import tokenizers
        from tokenizers import models, normalizers, pre_tokenizers, processors, trainers
    except ImportError:
        raise ImportError(
            f"data.tokenizer={kind} needs tokenizers: pip install 'torch-ffn[hf]'; char and byte do not"
        ) from None
    special: dict[str, Any] = {"special_tokens": [PAD, UNKNOWN, START], "show_progress": False}
    if kind == "word":
        made = tokenizers.Tokenizer(models.WordLevel(unk_token=UNKNOWN))
        made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])  # type: ignore
        made.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore
        trainer = trainers.WordLevelTrainer(vocab_size=vocab_size, **special)
    else:
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        if vocab_size < len(alphabet) + 3:
            raise ValueError(f"model.vocab_size={vocab_size}: bpe wants {len(alphabet) + 3} or more")
        made = tokenizers.Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore
        made.decoder = tokenizers.decoders.ByteLevel()  # type: ignore
        trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, **special)
    made.train_from_iterator(texts, trainer)
    if start:
        number = made.token_to_id(START)
        made.post_processor = processors.TemplateProcessing(  # type: ignore
            single=f"{START} $A", special_tokens=[(START, number)]
        )
    return HFTokenizer(made.to_str())
