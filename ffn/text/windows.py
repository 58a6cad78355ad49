"""Batches (B, T) of inputs and targets from tokens: shuffled for training, in order for validation."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor

IGNORED = -100  # target of positions that do not count in the loss


class Batches:
    """Shuffled training batches. Batch i is a pure function of (tokens, window, batch_size, seed, i).

    Each epoch cuts the tokens into windows without overlap, from a random offset, and visits all of them in
    random order. `batches(i)` returns inputs and targets (B, T), int64; targets are one token later.
    """

    def __init__(self, tokens: Tensor, window: int, batch_size: int, seed: int) -> None:
        if len(tokens) < window + 1:
            raise ValueError(
                f"the training text must have at least {window + 1} tokens, got {len(tokens)}; "
                "give more text or a smaller model.max_seq_len"
            )
        self.tokens, self.window, self.batch_size, self.seed = tokens, window, batch_size, seed
        self.windows_per_epoch = max(1, (len(tokens) - window) // window)
        self._epoch = (-1, torch.empty(0, dtype=torch.int64))

    def __call__(self, index: int) -> tuple[Tensor, Tensor]:
        first = index * self.batch_size
        starts = [self._start(number) for number in range(first, first + self.batch_size)]
        return gather(self.tokens, starts, self.window)

    def _start(self, number: int) -> int:
        epoch, place = divmod(number, self.windows_per_epoch)
        if self._epoch[0] != epoch:
            self._epoch = (epoch, self._starts(epoch))
        return int(self._epoch[1][place])

    def _starts(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "epoch", epoch))
        offsets = min(self.window, len(self.tokens) - self.windows_per_epoch * self.window)
        offset = torch.randint(offsets, (), generator=generator)
        return offset + self.window * torch.randperm(self.windows_per_epoch, generator=generator)


def validation_batches(
    tokens: Tensor, window: int, batch_size: int, limit: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield full windows over all tokens: every token but the first is a target exactly once.

    The last window overlaps the one before so that it is full; the overlap has `IGNORED` targets. A text
    shorter than one window gives one shorter window.

    Args:
        limit: at most so many batches, evenly spread; 0 for all.
    """
    predicted = len(tokens) - 1
    if predicted < 1:
        raise ValueError(f"the validation text must have at least 2 tokens, got {len(tokens)}")
    window = min(window, predicted)
    starts = list(range(0, predicted - window + 1, window))
    rest = predicted - len(starts) * window
    if rest:
        starts.append(predicted - window)
    chosen = range(0, len(starts), batch_size)
    if 0 < limit < len(chosen):
        chosen = [chosen[i * len(chosen) // limit] for i in range(limit)]
    for first in chosen:
        inputs, targets = gather(tokens, starts[first : first + batch_size], window)
        if rest and first + batch_size >= len(starts):
            targets[-1, : window - rest] = IGNORED
        yield inputs, targets


def gather(tokens: Tensor, starts: list[int], window: int) -> tuple[Tensor, Tensor]:
    """Return the windows at `starts` as inputs and, one token later, targets: (B, T), int64."""
    rows = torch.stack([tokens[start : start + window + 1] for start in starts]).to(torch.int64)
    return rows[:, :-1].clone(), rows[
        :, 1:
    ].clone()  # cloned: for one row both would be views of the same memory


def derive_seed(seed: int, *labels: str | int) -> int:
    """Return a 63-bit seed for one purpose, derived from the run's seed and the labels of the purpose."""
    name = "/".join(str(label) for label in (seed, *labels))
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) >> 1
