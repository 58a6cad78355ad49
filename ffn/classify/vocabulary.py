"""Train tokenizers on texts: words, byte pairs, characters or bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ffn.text.tokenizer import ByteTokenizer, CharTokenizer, HFTokenizer, Tokenizer, load_tokenizer

PAD, UNKNOWN, START = "[PAD]", "[UNK]", "[CLS]"
STRANGER = "\N{REPLACEMENT CHARACTER}"  # replaces characters outside a vocabulary
KINDS = ("word", "bpe", "char", "byte")


def train_tokenizer(kind: str, texts: Iterable[str], vocab_size: int, *, start: bool = False) -> Tokenizer:
    """Train a tokenizer on texts, or load one from a file.

    Args:
        kind: "word" (lower case, split at blanks and punctuation) or "bpe" (merged pairs of bytes), which
            need the package tokenizers; "char", the characters that occur twice or more; "byte", which
            ignores the texts; or the path of a tokenizer file.
        vocab_size: maximum number of entries.
        start: put [CLS] before each text ("word" and "bpe"), for a classifier that reads the first token.

    Raises:
        ValueError: no such kind or file, or `vocab_size` is too small for "bpe".
        ImportError: the package tokenizers is not installed.
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
        raise ValueError(f"data.tokenizer must be {', '.join(KINDS)} or a tokenizer file, got {kind}")
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
            raise ValueError(
                f"model.vocab_size must be {len(alphabet) + 3} or more for bpe, got {vocab_size}"
            )
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
