"""Train one classifier: epochs over rows of tokens, or over cached features if only the head trains.

    sources = {"train": TokenSource(rows, encode), "val": TokenSource(others, encode)}
    outcome = fit(model, sources, targets, objective, options, seed=1)

After `fit` the model has the weights of its best epoch. Equal arguments give equal weights.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from ffn.classify.batches import TextEncoder, batches, collate
from ffn.classify.config import FitConfig
from ffn.classify.objective import Objective, better
from ffn.nn.classifier import Classifier
from ffn.text.windows import derive_seed
from ffn.train.device import Precision, autocast
from ffn.train.steps import evaluating

EVALUATION_ROWS = 128  # batch size without gradients


class Source(Protocol):
    """The inputs of a model, one row per text: tokens or cached features."""

    @property
    def lengths(self) -> Sequence[int]:
        """Tokens of each row."""
        ...

    def logits(self, model: Classifier, index: Sequence[int], generator: torch.Generator | None) -> Tensor:
        """Return the logits (len(index), K) of some rows; a generator turns word dropout on."""
        ...


@dataclass
class TokenSource:
    """Rows of token ids, in the order of the texts."""

    rows: list[list[int]]
    encode: TextEncoder
    word_dropout: float = 0.0

    @property
    def lengths(self) -> Sequence[int]:
        return [len(row) for row in self.rows]

    def logits(self, model: Classifier, index: Sequence[int], generator: torch.Generator | None) -> Tensor:
        tokens, mask = self.batch(index, generator, model.head.out_proj.weight.device)
        return model(tokens, attention_mask=mask)

    def batch(
        self, index: Sequence[int], generator: torch.Generator | None, device: torch.device
    ) -> tuple[Tensor, Tensor | None]:
        """Return tokens (B, T) and their mask."""
        rows = [self.rows[i] for i in index]
        if generator is not None and self.word_dropout:
            rows = [self.encode.drop_words(row, self.word_dropout, generator) for row in rows]
        tokens, mask = collate(rows, self.encode.pad)
        return tokens.to(device), None if mask is None else mask.to(device)


@dataclass
class FeatureSource:
    """Pooled features (N, D) of a frozen backbone, the input of the head."""

    features: Tensor
    lengths: Sequence[int]

    def logits(self, model: Classifier, index: Sequence[int], generator: torch.Generator | None) -> Tensor:
        return model.head(self.features[torch.tensor(index, device=self.features.device)])


def cache_features(model: Classifier, source: TokenSource, precision: Precision = "float32") -> FeatureSource:
    """Run the backbone once over all rows and return its pooled features."""
    weight = model.head.out_proj.weight
    features = weight.new_empty(len(source.rows), model.backbone.config.dim)
    with evaluating(model), autocast(weight.device, precision):
        for index in batches(source.lengths, EVALUATION_ROWS):
            tokens, mask = source.batch(index, None, weight.device)
            features[index] = model.pooled(tokens, attention_mask=mask).to(features.dtype)
    return FeatureSource(features, source.lengths)


def compute_logits(model: Classifier, source: Source, precision: Precision = "float32") -> Tensor:
    """Return the logits (N, K) of all rows in eval mode: in order, float64, on the CPU."""
    logits = torch.empty(len(source.lengths), model.num_classes, dtype=torch.float64)
    with evaluating(model), autocast(model.head.out_proj.weight.device, precision):
        for index in batches(source.lengths, EVALUATION_ROWS):
            logits[index] = source.logits(model, index, None).double().cpu()
    return logits


@dataclass
class Outcome:
    """The result of `fit`: a row per epoch, the best epoch, why training ended, seconds of training."""

    history: list[dict[str, float]] = field(default_factory=list)
    best: float | None = None
    best_epoch: int = 0
    stopped: str = "finished"  # or "early" or "interrupted"
    seconds: float = 0.0


class Watcher(Protocol):
    """Receives the progress of `fit`."""

    def step(self, loss: float, speed: float) -> None:
        """A step is done, at `speed` texts/s."""
        ...

    def epoch(self, row: dict[str, float], best: bool) -> None:
        """An epoch is done."""
        ...


def fit(
    model: Classifier,
    sources: Mapping[str, Source],
    targets: Mapping[str, Tensor],
    objective: Objective,
    options: FitConfig,
    *,
    seed: int,
    precision: Precision = "float32",
    watcher: Watcher | None = None,
) -> Outcome:
    """Train the parameters that require a gradient; leave the model with the weights of its best epoch.

    Ctrl-C ends training too; before the end of the first epoch it raises KeyboardInterrupt.

    Args:
        sources, targets: the rows of the splits "train" and "val"; "val" decides which epoch is best.

    Raises:
        FloatingPointError: the loss or the gradient is not finite.
        ValueError: no parameter requires a gradient, or the metric is not defined on "val".
    """
    loop = _Loop(model, sources["train"], targets["train"], objective, options, seed, precision, watcher)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    outcome, kept = Outcome(), {}
    try:
        for epoch in range(1, options.epochs + 1):
            row = loop.epoch(epoch)
            outcome.seconds += row["seconds"]
            logits = compute_logits(model, sources["val"], precision)
            outcome.history.append(row | _values(objective, logits, targets["val"]))
            improved = _judge(outcome, options.chosen_metric)
            if improved:
                kept = {name: p.detach().clone() for name, p in trained.items()}
            if watcher is not None:
                watcher.epoch(outcome.history[-1], improved)
            stale = epoch - outcome.best_epoch
            if options.patience and stale >= options.patience and epoch < options.epochs:
                outcome.stopped = "early"
                break
    except KeyboardInterrupt:
        if not kept:
            raise
        outcome.stopped = "interrupted"
    with torch.no_grad():
        for name, value in kept.items():
            trained[name].copy_(value)
    model.eval()
    return outcome


def _values(objective: Objective, logits: Tensor, targets: Tensor) -> dict[str, float]:
    """Return the loss and the metrics of logits (N, K)."""
    loss = objective.loss(logits, targets).item()
    return {"loss": loss, **objective.scores(targets, objective.predictions(logits)).values}


def _judge(outcome: Outcome, metric: str) -> bool:
    """Record the last epoch if it is the best so far; return whether it is."""
    row = outcome.history[-1]
    if metric not in row:
        raise ValueError(
            f"train.metric={metric} is not defined on these validation rows; choose another metric"
        )
    if not better(metric, row[metric], outcome.best):
        return False
    outcome.best, outcome.best_epoch = row[metric], int(row["epoch"])
    return True


class _Loop:
    """The steps of one `fit`."""

    def __init__(self, model, source, targets, objective, options, seed, precision, watcher) -> None:
        self.model, self.source, self.objective, self.options = model, source, objective, options
        self.seed, self.precision, self.watcher = seed, precision, watcher
        self.device = model.head.out_proj.weight.device
        self.targets = targets.to(self.device)
        self.optimizer = options.build_optimizer(model)
        self.steps = options.epochs * math.ceil(len(targets) / options.batch_size)
        self.step = 0

    def epoch(self, epoch: int) -> dict[str, float]:
        """Train on every row once; return the epoch, the mean loss of its steps and its seconds."""
        begin = time.perf_counter()
        self.model.train()
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "epoch", epoch))
        losses = []
        for index in batches(self.source.lengths, self.options.batch_size, generator):
            start = time.perf_counter()
            losses.append(self._step(index, generator))
            if self.watcher is not None:
                self.watcher.step(losses[-1], len(index) / (time.perf_counter() - start))
        seconds = time.perf_counter() - begin
        return {"epoch": epoch, "train_loss": sum(losses) / len(losses), "seconds": seconds}

    def _step(self, index: list[int], generator: torch.Generator) -> float:
        with autocast(self.device, self.precision):
            logits = self.source.logits(self.model, index, generator)
        loss = self.objective.loss(logits, self.targets[torch.tensor(index, device=self.device)])
        loss.backward()
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm = float(nn.utils.clip_grad_norm_(parameters, self.options.clip or math.inf))
        value = loss.item()
        for what, number in (("loss", value), ("gradient's norm", norm)):
            if not math.isfinite(number):
                remedy = "use a lower train.lr or a longer train.warmup"
                raise FloatingPointError(f"step {self.step + 1}: the {what} is {number}; {remedy}")
        self.optimizer.step(self.options.lr_factor(self.step, self.steps))
        self.optimizer.zero_grad()
        self.step += 1
        return value
