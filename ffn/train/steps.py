"""Gradients from batches, and the validation loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ffn.gpt.transformer import Transformer
from ffn.text.windows import IGNORED, validation_batches
from ffn.train.device import Precision, autocast


def evaluate(
    model: Transformer,
    tokens: Tensor,
    *,
    batch_size: int = 32,
    limit: int = 0,
    precision: Precision = "float32",
    window: int = 0,
) -> float:
    """Return the mean loss, in nats per token, over full windows of `tokens`.

    Args:
        tokens: 1-D, the validation text.
        limit: at most so many batches, evenly spread; 0 for all.
        window: tokens per window; 0 for the model's max_seq_len.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
    device, window = next(model.parameters()).device, window or model.config.max_seq_len
    total, count = 0.0, 0
    with evaluating(model):
        for inputs, targets in validation_batches(tokens, window, batch_size, limit):
            counted = int((targets != IGNORED).sum())
            with autocast(device, precision):
                loss = model.loss(inputs.to(device), targets.to(device))
            total, count = total + loss.item() * counted, count + counted
    return total / count


def accumulate_gradients(
    model: Transformer, batches: Sequence[tuple[Tensor, Tensor]], precision: Precision = "float32"
) -> float:
    """Add the gradient of the mean loss of equally large batches to `.grad`; return that loss.

    Args:
        batches: pairs of tokens and targets, each (B, T).
    """
    device = next(model.parameters()).device
    losses = []
    for tokens, targets in batches:
        with autocast(device, precision):
            loss = model.loss(tokens.to(device), targets.to(device)) / len(batches)
        loss.backward()
        losses.append(loss.detach())
    return torch.stack(losses).sum().item()  # one .item(), because it waits for the device


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; compiled blocks run eagerly, since other shapes would compile again."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        model.train(was_training)
