"""Texts become token rows, and rows become batches: cut to the window, padded to their longest, shuffled.

encode = TextEncoder(tokenizer, window=100)
rows, cut = encode(["a text", "another"])
for index in batches(lengths, 32, generator):        # rows of like length stand together
    tokens, mask = collate([rows[i] for i in index], encode.pad)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ffn.classify.vocabulary import STRANGER
from ffn.text.tokenizer import CharTokenizer, HFTokenizer, Tokenizer

POOL = 50  # batches at most whose rows are sorted by length together


class TextEncoder:
    """Text -> token numbers, in the frame of special tokens that the tokenizer puts around a text.

    Args:
        tokenizer: of Hugging Face's, its own special tokens frame each text; of ours nothing does.
        window: how many tokens at most, special ones counted; what is beyond is cut off the end.
        pad: the number that fills up a batch; left out, the tokenizer's [PAD], or 0.

    Raises:
        ValueError: a window with no room for a token.
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
            raise ValueError(f"a window of {window} tokens has no room for a text; want a longer one")

    def __call__(self, texts: Iterable[str]) -> tuple[list[list[int]], int]:
        """The rows of the texts, and how many were cut. A text that has no token counts as one unknown."""
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
        """The row without some of its tokens, each left out with `probability`; special ones stay, and at
        least one other."""
        first, last = len(self.prefix), len(row) - len(self.suffix)
        kept = (torch.rand(last - first, generator=generator) >= probability).tolist()
        if not any(kept):
            kept[int(torch.randint(last - first, (), generator=generator))] = True
        middle = [number for number, keep in zip(row[first:last], kept, strict=True) if keep]
        return [*row[:first], *middle, *row[last:]]


def batches(
    lengths: Sequence[int], batch_size: int, generator: torch.Generator | None = None
) -> list[list[int]]:
    """The numbers of the rows, batch by batch, each row once.

    With a generator the rows are shuffled, sorted by length within pools of POOL batches or half of them all,
    and the batches shuffled: little padding, and other neighbours each epoch. Without one they are sorted by
    length.
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
    """tokens (B, T) int64, filled up on the right, and the mask (B, T) of real ones; None where all are."""
    lengths = [len(row) for row in rows]
    longest = max(lengths)
    tokens = torch.tensor([[*row, *[pad] * (longest - len(row))] for row in rows])
    if min(lengths) == longest:
        return tokens, None
    return tokens, torch.arange(longest) < torch.tensor(lengths)[:, None]
