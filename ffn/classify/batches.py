"""Turn texts into rows of token ids, and rows into batches: truncated, padded on the right, shuffled.

encode = TextEncoder(tokenizer, window=100)
rows, cut = encode(["a text", "another"])
for index in batches(lengths, 32, generator):        # row numbers; rows of similar length share a batch
    tokens, mask = collate([rows[i] for i in index], encode.pad)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ffn.classify.vocabulary import STRANGER
from ffn.text.tokenizer import CharTokenizer, HFTokenizer, Tokenizer

POOL = 50  # at most so many batches share one sort by length


class TextEncoder:
    """Text -> token ids, between the special tokens that the tokenizer puts around a text.

    Args:
        tokenizer: one of Hugging Face adds its special tokens; one of ours adds none.
        window: maximum number of tokens, special tokens included; longer texts lose their end.
        pad: id of the padding; by default the tokenizer's [PAD], or 0.

    Raises:
        ValueError: the window has no room for a text token.
    """

    def __init__(self, tokenizer: Tokenizer, window: int, pad: int | None = None) -> None:
        self.tokenizer, self.window = tokenizer, window
        hf = isinstance(tokenizer, HFTokenizer)
        self.prefix, self.suffix = tokenizer.frame() if hf else ([], [])
        found = tokenizer.number("[PAD]", "<pad>") if hf else None
        self.pad = (found or 0) if pad is None else pad
        self._nothing = (tokenizer.number("[UNK]", "<unk>") if hf else None) or 0
        known = set(tokenizer.vocabulary) if isinstance(tokenizer, CharTokenizer) else set()
        self._known = known if STRANGER in known else None
        self.room = window - len(self.prefix) - len(self.suffix)
        if self.room < 1:
            raise ValueError(f"window={window} leaves no room for a text token; use a longer window")

    def __call__(self, texts: Iterable[str]) -> tuple[list[list[int]], int]:
        """Return the rows and how many were truncated; a text without tokens becomes one unknown token."""
        rows, cut = [], 0
        for text in texts:
            numbers = self._numbers(text) or [self._nothing]
            cut += len(numbers) > self.room
            rows.append([*self.prefix, *numbers[: self.room], *self.suffix])
        return rows, cut

    def _numbers(self, text: str) -> list[int]:
        if self._known is not None:
            text = "".join(c if c in self._known else STRANGER for c in text)
        return self.tokenizer.encode(text)

    def drop_words(self, row: Sequence[int], probability: float, generator: torch.Generator) -> list[int]:
        """Drop each token of a row with `probability`; keep special tokens and at least one other token."""
        first, last = len(self.prefix), len(row) - len(self.suffix)
        kept = (torch.rand(last - first, generator=generator) >= probability).tolist()
        if not any(kept):
            kept[int(torch.randint(last - first, (), generator=generator))] = True
        middle = [number for number, keep in zip(row[first:last], kept, strict=True) if keep]
        return [*row[:first], *middle, *row[last:]]


def batches(
    lengths: Sequence[int], batch_size: int, generator: torch.Generator | None = None
) -> list[list[int]]:
    """Return row numbers in batches, each row once.

    Without a generator the rows are sorted by length. With one they are shuffled, sorted by length within
    pools of at most POOL batches and at most half of all rows, and the batches are shuffled: there is little
    padding, and each epoch has different batches.
    """
    if generator is None:
        order = sorted(range(len(lengths)), key=lambda row: lengths[row])
        return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    order = torch.randperm(len(lengths), generator=generator).tolist()
    pooled = batch_size * max(1, min(POOL, len(order) // batch_size // 2))
    found = []
    for start in range(0, len(order), pooled):
        pool = sorted(order[start : start + pooled], key=lambda row: lengths[row])
        found += [pool[i : i + batch_size] for i in range(0, len(pool), batch_size)]
    return [found[i] for i in torch.randperm(len(found), generator=generator).tolist()]


def collate(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor | None]:
    """Return tokens (B, T) int64, padded on the right, and their mask (B, T); None if nothing is padding."""
    lengths = [len(row) for row in rows]
    longest = max(lengths)
    tokens = torch.tensor([[*row, *[pad] * (longest - len(row))] for row in rows])
    if min(lengths) == longest:
        return tokens, None
    return tokens, torch.arange(longest) < torch.tensor(lengths)[:, None]
