"""What training does with a model between two updates: gradients from batches, and the validation loss."""

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
    """Mean nats a token over full windows of `tokens`: all of them, or `limit` batches evenly spread.

    window: tokens of each; 0 for as many as the model reads at most.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: want 1 or more")
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
    """Add the gradient of the mean loss of equal batches (tokens, targets) to `.grad`; returns that loss."""
    device = next(model.parameters()).device
    losses = []
    for tokens, targets in batches:
        with autocast(device, precision):
            loss = model.loss(tokens.to(device), targets.to(device)) / len(batches)
        loss.backward()
        losses.append(loss.detach())
    return torch.stack(losses).sum().item()  # read once: a reading waits for the device


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients, and compiled blocks run as they are: other shapes would compile anew."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        model.train(was_training)
