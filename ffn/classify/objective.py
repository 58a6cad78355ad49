"""Losses, predictions and metrics: cross entropy, binary cross entropy or mean squared error.

loss                    logits per text   targets         predictions
cross_entropy           K                 class numbers   softmax(logits), (N, K)
binary_cross_entropy    1, of class 1     class numbers   1 - sigmoid(logit), sigmoid(logit), (N, 2)
mse                     1                 numbers         the logit, (N,)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ffn.classify.metrics import (
    CLASS_METRICS,
    NUMBER_METRICS,
    Scores,
    balanced_weights,
    binary_cross_entropy,
    score_classes,
    score_numbers,
)

Loss = Literal["cross_entropy", "binary_cross_entropy", "mse"]
METRICS = {  # names for train.metric; the second is the default
    "cross_entropy": ("loss", *CLASS_METRICS),
    "binary_cross_entropy": ("loss", *CLASS_METRICS),
    "mse": ("loss", *NUMBER_METRICS),
}
LOWER_IS_BETTER = ("loss", "mse")


@dataclass(frozen=True)
class Objective:
    """A loss with its classes; without classes it is regression.

    Raises:
        ValueError: binary_cross_entropy without exactly two classes.
    """

    loss_name: Loss
    classes: tuple[str, ...] = ()
    class_weights: Tensor | None = None  # (K,)
    label_smoothing: float = 0.0
    center: float = 0.0  # mse: the number that a logit of 0 means
    scale: float = 1.0  # mse: added to it by a logit of 1

    def __post_init__(self) -> None:
        if self.loss_name == "binary_cross_entropy" and len(self.classes) != 2:
            got = len(self.classes)
            raise ValueError(
                f"train.loss=binary_cross_entropy needs two classes, got {got}; use cross_entropy"
            )

    @property
    def num_logits(self) -> int:
        """Logits per text."""
        return len(self.classes) if self.loss_name == "cross_entropy" else 1

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss of logits (N, num_logits), in float32 at least; weighted by class_weights."""
        logits = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
        weights = self.class_weights
        weights = None if weights is None else weights.to(logits)
        match self.loss_name:
            case "cross_entropy":
                return F.cross_entropy(logits, targets, weights, label_smoothing=self.label_smoothing)
            case "binary_cross_entropy":
                return binary_cross_entropy(logits[:, 0], targets, weights, self.label_smoothing)
        return F.mse_loss(logits[:, 0], ((targets - self.center) / self.scale).to(logits.dtype))

    def predictions(self, logits: Tensor) -> Tensor:
        """Return probabilities (N, K), or numbers (N,) for mse, in float64."""
        logits = logits.double()
        match self.loss_name:
            case "cross_entropy":
                return logits.softmax(-1)
            case "binary_cross_entropy":
                return torch.cat([(-logits).sigmoid(), logits.sigmoid()], dim=-1)
        return self.center + self.scale * logits[:, 0]

    def scores(self, targets: Tensor, predictions: Tensor) -> Scores:
        """Compute the metrics of predictions."""
        if self.loss_name == "mse":
            return score_numbers(targets, predictions)
        ranks = predictions[:, 1] if len(self.classes) == 2 else None
        return score_classes(targets, predictions.argmax(-1), self.classes, ranks)

    def wrongness(self, targets: Tensor, predictions: Tensor) -> Tensor:
        """Return the error of each row (N,): 1 - probability of the true class, or the squared error."""
        if self.loss_name == "mse":
            return (targets.double() - predictions).square()
        return 1.0 - predictions.gather(1, targets[:, None])[:, 0]


def better(metric: str, value: float, than: float | None) -> bool:
    """Return whether a value of a metric is better than the best so far."""
    if than is None:
        return True
    return value < than if metric in LOWER_IS_BETTER else value > than


def parse_class_weights(words: str, classes: Sequence[str], targets: Tensor) -> Tensor | None:
    """Parse train.class_weights: "none", "balanced" (by the rows in targets), or "neg:1, pos:2.5".

    Returns:
        (K,) float32, or None for "none".

    Raises:
        ValueError: a class is unknown or missing, or a weight is not a positive number.
    """
    if words == "none":
        return None
    if not classes:
        raise ValueError(f"train.class_weights must be none for regression, got {words}")
    if words == "balanced":
        return balanced_weights(targets, len(classes))
    found = {}
    for word in words.split(","):
        name, colon, value = word.strip().rpartition(":")
        try:
            found[name] = float(value)
        except ValueError:
            colon = ""
        if not colon or name not in classes or not 0 < found[name] < float("inf"):
            pairs = f"class:weight pairs of {', '.join(classes[:20])}"
            raise ValueError(f"train.class_weights must be {pairs}, got {word.strip()!r}")
    if missing := [name for name in classes if name not in found]:
        raise ValueError(f"train.class_weights: no weight given for {', '.join(missing)}")
    return torch.tensor([found[name] for name in classes])
