"""Metrics of predictions as functions on tensors, and `Scores`, which prints and stores them.

The numbers equal scikit-learn's with `labels=range(K)` and `zero_division=0`: a division by zero gives 0, and
a class that neither occurs nor is predicted counts as 0 in the macro average. K is the number of classes, N
the number of rows. Metrics are computed on the CPU, in float64 and int64.
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
MATRIX_SHOWN = 12  # largest number of classes with a confusion matrix in the table


def confusion_matrix(true: Tensor, predicted: Tensor, num_classes: int) -> Tensor:
    """Count how often class i (row) was predicted as class j (column): (K, K) int64.

    Args:
        true, predicted: (N,), integers in 0 .. num_classes - 1.

    Raises:
        ValueError: no rows, other shapes, or a class out of range.
        TypeError: a dtype that is not an integer.
    """
    _check_rows("confusion_matrix", true, predicted)
    for name, tensor in (("true", true), ("predicted", predicted)):
        if tensor.is_floating_point() or tensor.is_complex():
            raise TypeError(f"{name} must have an integer dtype, got {tensor.dtype}")
    true, predicted = true.cpu().long(), predicted.cpu().long()
    both = torch.cat([true, predicted])
    if len(wrong := both[(both < 0) | (both >= num_classes)]):
        raise ValueError(f"class numbers must be in 0 .. {num_classes - 1}, got {int(wrong[0])}")
    counts = torch.bincount(true * num_classes + predicted, minlength=num_classes**2)
    return counts.view(num_classes, num_classes)


def accuracy(matrix: Tensor) -> float:
    """Return the share of correct rows of a confusion matrix; ValueError if it is empty."""
    return int(matrix.diagonal().sum()) / _total(matrix)


def precision_recall_f1(matrix: Tensor) -> Tensor:
    """Return precision, recall and F1 of each class of a confusion matrix: (K, 3) float64.

    precision = hits / predicted, recall = hits / true, F1 = 2 hits / (predicted + true), their harmonic mean;
    0 where the divisor is 0. ValueError if the matrix is empty.
    """
    _total(matrix)
    hits, predicted, true = matrix.diagonal(), matrix.sum(0), matrix.sum(1)
    return torch.stack([_ratio(hits, predicted), _ratio(hits, true), _ratio(2 * hits, predicted + true)], 1)


def averaged(matrix: Tensor, how: str) -> tuple[float, float, float]:
    """Return precision, recall and F1 of a confusion matrix, averaged over the classes.

    "macro" is the mean over classes; "weighted" weights each class by its rows; "micro" pools the hits and
    misses of all classes, so that with one class per row all three equal the accuracy.
    """
    if how not in AVERAGES:
        raise ValueError(f"how must be one of {', '.join(AVERAGES)}, got {how!r}")
    if how == "micro":
        return (accuracy(matrix), accuracy(matrix), accuracy(matrix))
    each = precision_recall_f1(matrix)
    mean = each.mean(0) if how == "macro" else matrix.sum(1).double() @ each / _total(matrix)
    precision, recall, f1 = mean.tolist()
    return precision, recall, f1


def roc_auc(true: Tensor, scores: Tensor) -> float:
    """Return the area under the ROC curve: the chance that a row of class 1 scores above a row of class 0.

    Ties count half (the rank statistic of Mann and Whitney). NaN if only one class occurs, as in
    scikit-learn.

    Args:
        true: (N,), 0 or 1.
        scores: (N,), higher for class 1, such as a difference of logits.

    Raises:
        ValueError: no rows, other shapes, other classes, or scores that are not finite.
    """
    ones, zeros = confusion_matrix(true, true, 2).diagonal().flip(0).tolist()
    _check_rows("roc_auc", true, scores)
    _check_finite("scores", scores)
    _, place, ties = torch.unique(scores.cpu().double(), return_inverse=True, return_counts=True)
    rank = ties.cumsum(0) - (ties - 1) / 2.0  # from 1; equal scores share their mean rank
    won = rank.double()[place][true.cpu() == 1].sum() - ones * (ones + 1) / 2
    return float(won / (ones * zeros))  # 0 / 0 of tensors is NaN


def mean_squared_error(true: Tensor, predicted: Tensor) -> float:
    """Return the mean of (true - predicted)^2; ValueError for no rows, other shapes, NaN or infinity."""
    return float(F.mse_loss(*_numbers("mean_squared_error", true, predicted)))


def r2(true: Tensor, predicted: Tensor) -> float:
    """Return the coefficient of determination: 1 - squared error / squared error of the mean.

    As in scikit-learn, a constant `true` gives 1 if predicted exactly and else 0, and one row gives NaN.
    """
    true, predicted = _numbers("r2", true, predicted)
    if len(true) < 2:
        return math.nan
    if bool((true == true[0]).all()):
        return float(torch.equal(true, predicted))
    return float(1.0 - (true - predicted).square().sum() / (true - true.mean()).square().sum())


def balanced_weights(true: Tensor, num_classes: int) -> Tensor:
    """Return class weights N / (K * rows of the class), (K,) float32; each class weighs the same in the loss.

    Raises:
        ValueError: a class has no row.
    """
    rows = confusion_matrix(true, true, num_classes).diagonal()
    if not rows.all():
        raise ValueError(f"balanced weights need rows of every class; class {int(rows.argmin())} has none")
    return (len(true) / (num_classes * rows.double())).float()


def binary_cross_entropy(
    logits: Tensor, true: Tensor, class_weights: Tensor | None = None, label_smoothing: float = 0.0
) -> Tensor:
    """Return the cross entropy of two classes from one logit z per row, in nats: F.cross_entropy of (0, z).

    Unlike torch's binary loss, it takes class weights and label smoothing as F.cross_entropy does.

    Args:
        logits: (N,), of class 1 over class 0.
        true: (N,) int64, 0 or 1.
        class_weights: (2,) or None.
    """
    both = torch.stack([torch.zeros_like(logits), logits], dim=-1)
    return F.cross_entropy(both, true, class_weights, label_smoothing=label_smoothing)


@dataclass(frozen=True)
class Scores:
    """The metrics of an evaluation; undefined metrics, such as roc_auc of one class, are left out."""

    rows: int
    values: dict[str, float]  # keys: CLASS_METRICS or NUMBER_METRICS
    classes: tuple[str, ...] = ()  # () for regression
    each: tuple[tuple[float, float, float], ...] = ()  # precision, recall, F1 of each class
    confusion: tuple[tuple[int, ...], ...] = ()  # rows true, columns predicted

    def table(self) -> str:
        """Return aligned lines: classes, averages, other metrics, and the confusion matrix if it is small."""
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
        """Return lists, strings and finite numbers, for JSON."""
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
    """Compute all CLASS_METRICS.

    Args:
        true, predicted: (N,), class numbers.
        classes: K class names.
        scores: (N,), higher for class 1 of two classes; without them there is no roc_auc.

    Raises:
        ValueError, TypeError: as `confusion_matrix` and `roc_auc`.
    """
    if scores is not None and len(classes) != 2:
        raise ValueError(f"scores must be None unless there are two classes, got {len(classes)} classes")
    matrix = confusion_matrix(true, predicted, len(classes))
    values = {"accuracy": accuracy(matrix)}
    for how in AVERAGES:
        values |= {f"{kind}_{how}": v for kind, v in zip(KINDS, averaged(matrix, how), strict=True)}
    if scores is not None and not math.isnan(area := roc_auc(true, scores)):
        values["roc_auc"] = area
    each = tuple((p, r, f) for p, r, f in precision_recall_f1(matrix).tolist())
    return Scores(len(true), values, tuple(classes), each, tuple(tuple(row) for row in matrix.tolist()))


def score_numbers(true: Tensor, predicted: Tensor) -> Scores:
    """Compute all NUMBER_METRICS of two (N,) tensors."""
    values = {"mse": mean_squared_error(true, predicted), "r2": r2(true, predicted)}
    return Scores(len(true), {name: value for name, value in values.items() if math.isfinite(value)})


def _check_rows(name: str, true: Tensor, other: Tensor) -> None:
    if true.dim() != 1 or true.shape != other.shape:
        shapes = f"{tuple(true.shape)} and {tuple(other.shape)}"
        raise ValueError(f"{name}: both tensors must have one shape (N,), got {shapes}")
    if not len(true):
        raise ValueError(f"{name}: there are no rows")


def _check_finite(name: str, tensor: Tensor) -> None:
    if not bool(tensor.isfinite().all()):
        row = int((~tensor.isfinite()).nonzero()[0])
        raise ValueError(f"{name} must be finite, got {float(tensor[row])} in row {row}")


def _numbers(name: str, true: Tensor, predicted: Tensor) -> tuple[Tensor, Tensor]:
    _check_rows(name, true, predicted)
    _check_finite("true", true)
    _check_finite("predicted", predicted)
    return true.cpu().double(), predicted.cpu().double()


def _total(matrix: Tensor) -> int:
    if not (total := int(matrix.sum())):
        raise ValueError("matrix: there are no rows")
    return total


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    return torch.where(whole > 0, part.double() / whole.clamp(min=1), 0.0)


def _show(value: float) -> str:
    if isinstance(value, int):
        return str(value)
    return f"{value:.4f}" if value == 0.0 or 1e-3 <= abs(value) < 1e6 else f"{value:.4g}"


def _printable(name: str) -> str:
    return name if name.isprintable() else ascii(name)
