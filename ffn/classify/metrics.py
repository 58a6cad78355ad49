"""How good predictions are: small functions on tensors, and `Scores`, which shows them and writes them down.

The numbers are scikit-learn's, with `labels=range(K)` and `zero_division=0`: what would be divided by zero is
0, and a class that neither occurs nor is predicted counts as 0 in the macro average. K is the number of
classes, N the number of rows. Metrics are computed on the CPU, in float64 and int64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ffn.text_table import columns

AVERAGES = ("macro", "micro", "weighted")
KINDS = ("precision", "recall", "f1")
CLASS_METRICS = ("accuracy", *(f"{kind}_{how}" for how in AVERAGES for kind in KINDS), "roc_auc")
NUMBER_METRICS = ("mse", "r2")
MATRIX_SHOWN = 12  # classes whose confusion matrix still fits a screen


def confusion_matrix(true: Tensor, predicted: Tensor, num_classes: int) -> Tensor:
    """How often class i (row) was taken for class j (column): (K, K) int64.

    Args:
        true: (N,), whole numbers 0 <= class < num_classes. predicted: the same.

    Raises ValueError for no rows, for other shapes and for classes out of range, TypeError for other dtypes.
    """
    _check_rows("confusion_matrix", true, predicted)
    for name, tensor in (("true", true), ("predicted", predicted)):
        if tensor.is_floating_point() or tensor.is_complex():
            raise TypeError(f"{name}: wants class numbers, a whole-number dtype; got {tensor.dtype}")
    true, predicted = true.cpu().long(), predicted.cpu().long()
    both = torch.cat([true, predicted])
    if len(wrong := both[(both < 0) | (both >= num_classes)]):
        raise ValueError(f"class {int(wrong[0])} is not among the {num_classes}, numbered from 0")
    counts = torch.bincount(true * num_classes + predicted, minlength=num_classes**2)
    return counts.view(num_classes, num_classes)


def accuracy(matrix: Tensor) -> float:
    """The share of rows whose class was predicted, from a confusion matrix; ValueError where it is empty."""
    return int(matrix.diagonal().sum()) / _total(matrix)


def precision_recall_f1(matrix: Tensor) -> Tensor:
    """(K, 3) float64 from a confusion matrix: each class's precision, recall and F1.

    precision = hits / predicted, recall = hits / true, F1 = 2 hits / (predicted + true), the harmonic mean of
    both; 0 where the divisor is 0. ValueError where the matrix is empty.
    """
    _total(matrix)
    hits, predicted, true = matrix.diagonal(), matrix.sum(0), matrix.sum(1)
    return torch.stack([_ratio(hits, predicted), _ratio(hits, true), _ratio(2 * hits, predicted + true)], 1)


def averaged(matrix: Tensor, how: str) -> tuple[float, float, float]:
    """Precision, recall and F1 over all classes, from a confusion matrix.

    "macro" is the mean over the classes, "weighted" the mean over them weighted by their rows, "micro" comes
    from the hits and misses of all classes together: with one class a row all three are the accuracy then.
    """
    if how not in AVERAGES:
        raise ValueError(f"an average is one of {', '.join(AVERAGES)}; got {how!r}")
    if how == "micro":
        return (accuracy(matrix), accuracy(matrix), accuracy(matrix))
    each = precision_recall_f1(matrix)
    mean = each.mean(0) if how == "macro" else matrix.sum(1).double() @ each / _total(matrix)
    precision, recall, f1 = mean.tolist()
    return precision, recall, f1


def roc_auc(true: Tensor, scores: Tensor) -> float:
    """The chance that a row of class 1 scores above a row of class 0, ties counting half.

    That is the area under the ROC curve, as the rank statistic of Mann and Whitney. NaN where only one class
    occurs, as in scikit-learn.

    Args:
        true: (N,) of 0 and 1. scores: (N,), higher for class 1, as a difference of logits is.

    Raises ValueError for no rows, other shapes, other classes, and scores that are NaN or infinite.
    """
    ones, zeros = confusion_matrix(true, true, 2).diagonal().flip(0).tolist()
    _check_rows("roc_auc", true, scores)
    _check_finite("scores", scores)
    _, place, ties = torch.unique(scores.cpu().double(), return_inverse=True, return_counts=True)
    rank = ties.cumsum(0) - (ties - 1) / 2.0  # from 1; equal scores share the mean of their ranks
    won = rank.double()[place][true.cpu() == 1].sum() - ones * (ones + 1) / 2
    return float(won / (ones * zeros))  # a tensor's 0 / 0 is NaN


def mean_squared_error(true: Tensor, predicted: Tensor) -> float:
    """The mean of (true - predicted)^2, both (N,); ValueError for no rows, other shapes, NaN and infinity."""
    return float(F.mse_loss(*_numbers("mean_squared_error", true, predicted)))


def r2(true: Tensor, predicted: Tensor) -> float:
    """1 - squared error / squared error of the mean: the share of the variance of `true` that is explained.

    Where `true` is constant, 1 if it is predicted exactly and else 0; NaN for one row: as in scikit-learn.
    """
    true, predicted = _numbers("r2", true, predicted)
    if len(true) < 2:
        return math.nan
    if bool((true == true[0]).all()):
        return float(torch.equal(true, predicted))
    return float(1.0 - (true - predicted).square().sum() / (true - true.mean()).square().sum())


def balanced_weights(true: Tensor, num_classes: int) -> Tensor:
    """N / (K rows of the class), (K,) float32: with them every class weighs the same in the loss.

    ValueError where a class has no row.
    """
    rows = confusion_matrix(true, true, num_classes).diagonal()
    if not rows.all():
        raise ValueError(f"balanced weights: class {int(rows.argmin())} has no row; it cannot be weighed up")
    return (len(true) / (num_classes * rows.double())).float()


def binary_cross_entropy(
    logits: Tensor, true: Tensor, class_weights: Tensor | None = None, label_smoothing: float = 0.0
) -> Tensor:
    """The cross entropy of two classes from one logit a row, in nats: F.cross_entropy of the logits (0, z).

    Class weights and label smoothing mean what they mean there, for which torch's binary loss has no words.

    Args:
        logits: (N,), of class 1 over class 0. true: (N,) int64 of 0 and 1. class_weights: (2,) or None.
    """
    both = torch.stack([torch.zeros_like(logits), logits], dim=-1)
    return F.cross_entropy(both, true, class_weights, label_smoothing=label_smoothing)


@dataclass(frozen=True)
class Scores:
    """What an evaluation found. A value not defined on its rows, as roc_auc of one class, is left out."""

    rows: int
    values: dict[str, float]  # by the names of CLASS_METRICS or NUMBER_METRICS
    classes: tuple[str, ...] = ()  # empty for numbers
    each: tuple[tuple[float, float, float], ...] = ()  # precision, recall, F1 of each class
    confusion: tuple[tuple[int, ...], ...] = ()  # rows true, columns predicted

    def table(self) -> str:
        """Aligned lines: class by class, the averages, the rest, the confusion matrix if it is not wide."""
        if not self.classes:
            numbers = self.values | {"rows": self.rows}
            return "\n".join(columns([[name, _show(value)] for name, value in numbers.items()]))
        counts = [sum(row) for row in self.confusion]
        lines = [["", *KINDS, "rows"]]
        for name, found, count in zip(self.classes, self.each, counts, strict=True):
            lines.append([_printable(name), *map(_show, found), str(count)])
        lines += [[how, *(_show(self.values[f"{kind}_{how}"]) for kind in KINDS), ""] for how in AVERAGES]
        lines += [[n, "", "", _show(self.values[n]), ""] for n in ("accuracy", "roc_auc") if n in self.values]
        lines[-1][-1] = str(self.rows)
        if len(self.classes) > MATRIX_SHOWN:
            return "\n".join(columns(lines))
        names = [_printable(name) for name in self.classes]
        matrix = [[name, *map(str, row)] for name, row in zip(names, self.confusion, strict=True)]
        return "\n".join([*columns(lines), "", *columns([["true \\ predicted", *names], *matrix])])

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, strings and finite numbers, for JSON."""
        found: dict[str, Any] = {"rows": self.rows, **self.values}
        if self.classes:
            rows = zip(self.classes, self.each, self.confusion, strict=True)
            found["classes"] = [
                {"class": name, **dict(zip(KINDS, each, strict=True)), "rows": sum(row)}
                for name, each, row in rows
            ]
            found["confusion"] = [list(row) for row in self.confusion]
        return found


def score_classes(
    true: Tensor, predicted: Tensor, classes: Sequence[str], scores: Tensor | None = None
) -> Scores:
    """All of CLASS_METRICS.

    Args:
        true, predicted: (N,), the numbers of classes. classes: their names, K of them.
        scores: (N,), higher for class 1, of two; without them there is no roc_auc.

    Raises ValueError and TypeError as the functions above do.
    """
    if scores is not None and len(classes) != 2:
        raise ValueError(f"scores: roc_auc wants two classes; got {len(classes)}")
    matrix = confusion_matrix(true, predicted, len(classes))
    values = {"accuracy": accuracy(matrix)}
    for how in AVERAGES:
        values |= {f"{kind}_{how}": v for kind, v in zip(KINDS, averaged(matrix, how), strict=True)}
    if scores is not None and not math.isnan(area := roc_auc(true, scores)):
        values["roc_auc"] = area
    each = tuple((p, r, f) for p, r, f in precision_recall_f1(matrix).tolist())
    return Scores(len(true), values, tuple(classes), each, tuple(tuple(row) for row in matrix.tolist()))


def score_numbers(true: Tensor, predicted: Tensor) -> Scores:
    """All of NUMBER_METRICS for two (N,) tensors of numbers."""
    values = {"mse": mean_squared_error(true, predicted), "r2": r2(true, predicted)}
    return Scores(len(true), {name: value for name, value in values.items() if math.isfinite(value)})


def _check_rows(name: str, true: Tensor, other: Tensor) -> None:
    if true.dim() != 1 or true.shape != other.shape:
        shapes = f"{tuple(true.shape)} and {tuple(other.shape)}"
        raise ValueError(f"{name} wants two tensors of one shape (N,); got {shapes}")
    if not len(true):
        raise ValueError(f"{name}: no rows, nothing to measure")


def _check_finite(name: str, tensor: Tensor) -> None:
    if not bool(tensor.isfinite().all()):
        row = int((~tensor.isfinite()).nonzero()[0])
        raise ValueError(f"{name}: wants finite numbers; row {row} is {float(tensor[row])}")


def _numbers(name: str, true: Tensor, predicted: Tensor) -> tuple[Tensor, Tensor]:
    _check_rows(name, true, predicted)
    _check_finite("true", true)
    _check_finite("predicted", predicted)
    return true.cpu().double(), predicted.cpu().double()


def _total(matrix: Tensor) -> int:
    if not (total := int(matrix.sum())):
        raise ValueError("an empty confusion matrix: no rows, nothing to measure")
    return total


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    return torch.where(whole > 0, part.double() / whole.clamp(min=1), 0.0)


def _show(value: float) -> str:
    if isinstance(value, int):
        return str(value)
    return f"{value:.4f}" if value == 0.0 or 1e-3 <= abs(value) < 1e6 else f"{value:.4g}"


def _printable(name: str) -> str:
    return name if name.isprintable() else ascii(name)
