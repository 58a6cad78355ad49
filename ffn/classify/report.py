"""Report a classifier's training: progress lines, pictures, metrics.csv and predictions.csv."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from ffn.classify.labelled import Labelled
from ffn.classify.loop import Outcome
from ffn.classify.metrics import Scores
from ffn.classify.objective import LOWER_IS_BETTER, Objective
from ffn.files.atomic import write_file
from ffn.train.report import Screen, clock

LONGEST_NAME = 40  # of a class name in the confusion picture; longer names are numbered
NO_PICTURES = "no pictures: matplotlib is not installed (pip install 'torch-ffn[app]')"


class EpochScreen(Screen):
    """A line per epoch; on a terminal also a bar with the loss and the best metric."""

    def __init__(self, say: Callable[[str], None], steps: int, epochs: int, metric: str) -> None:
        super().__init__(say, steps, 0)
        self._epochs, self._metric, self._best = epochs, metric, ""

    def step(self, loss: float, speed: float) -> None:
        """Show that one more step is done, at `speed` texts/s."""
        if self._bar is not None:
            text = f"loss {loss:.3f}{self._best}, {speed:,.0f} texts/s"
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update()

    def epoch(self, row: Mapping[str, float], best: bool) -> None:
        """Print the line of a finished epoch."""
        found = [f"loss {row['train_loss']:.4f}", f"val {row['loss']:.4f}"]
        if self._metric != "loss":
            found.append(f"{self._metric} {row[self._metric]:.4f}")
        if best:
            self._best = f", {found[-1]}"
        found += [clock(row["seconds"]), *["best so far"] * best]
        self.say(f"epoch {row['epoch']}/{self._epochs}  {'  '.join(found)}")


def write_history(path: Path, histories: Mapping[int, Outcome]) -> None:
    """Write metrics.csv: one row per seed and epoch."""
    rows = [{"seed": seed, **row} for seed, outcome in histories.items() for row in outcome.history]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def write_predictions(
    path: Path, rows: Labelled, objective: Objective, targets: Tensor, predictions: Tensor
) -> None:
    """Write predictions.csv atomically: mistakes first, the worst at the top, then correct rows, the least
    certain at the top."""
    wrong = objective.wrongness(targets, predictions)
    order = wrong.argsort(descending=True, stable=True).tolist()
    if objective.classes:
        right = predictions.argmax(-1) == targets
        order.sort(key=right.tolist().__getitem__)
    file = io.StringIO(newline="")
    writer = csv.writer(file, lineterminator="\n")
    if objective.classes:
        writer.writerow(["label", "predicted", "probability", "of_label", "text", "file", "line"])
    else:
        writer.writerow(["label", "predicted", "squared_error", "text", "file", "line"])
    for row in order:
        place = (rows.texts[row], *rows.where[row])
        if objective.classes:
            best = int(predictions[row].argmax())
            likely, right = float(predictions[row, best]), 1.0 - float(wrong[row])
            said = (objective.classes[best], f"{likely:.6f}", f"{right:.6f}")
        else:
            said = (repr(float(predictions[row])), repr(float(wrong[row])))
        writer.writerow([rows.labels[row], *said, *place])
    write_file(path, file.getvalue())


def draw(folder: Path, histories: Mapping[int, Outcome], metric: str, scores: Scores) -> bool:
    """Draw curves.png and, for classes, confusion.png; return False if matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    _draw_curves(figure, histories, metric)
    figure.savefig(folder / "curves.png", dpi=120)
    if scores.classes:
        side = min(16.0, 3.0 + 0.45 * len(scores.classes))
        figure = Figure(figsize=(side, side), layout="constrained")
        FigureCanvasAgg(figure)
        _draw_confusion(figure, scores.confusion, scores.classes)
        figure.savefig(folder / "confusion.png", dpi=120)
    return True


def _draw_curves(figure, histories: Mapping[int, Outcome], metric: str) -> None:
    """Draw the losses on the left and the metric on the right, one line per seed."""
    left, right = figure.subplots(1, 2)
    for number, (seed, outcome) in enumerate(histories.items()):
        epochs = [row["epoch"] for row in outcome.history]
        colour, many = f"C{number % 10}", len(histories) > 1
        of_seed = f", seed {seed}" if many else ""
        for name, style in (("train_loss", "--"), ("loss", "o-")):
            label = ("training" if name == "train_loss" else "validation") + of_seed
            left.plot(epochs, [row[name] for row in outcome.history], style, color=colour, label=label)
        values = [row[metric] for row in outcome.history]
        right.plot(epochs, values, "o-", color=colour, label=f"validation{of_seed}")
        right.axvline(outcome.best_epoch, color=colour, linewidth=0.5)
    left.set(xlabel="epoch", ylabel="loss")
    right.set(xlabel="epoch", ylabel=metric, title="lower is better" if metric in LOWER_IS_BETTER else "")
    left.legend(fontsize="small")


def _draw_confusion(figure, matrix: Sequence[Sequence[int]], classes: Sequence[str]) -> None:
    """Draw counts, coloured by their share of the row; number names that are long or not ASCII."""
    plain = [name.isascii() and name.isprintable() and len(name) <= LONGEST_NAME for name in classes]
    names = [classes[i] if ok else str(i) for i, ok in enumerate(plain)]
    shares = [[count / max(1, sum(row)) for count in row] for row in matrix]
    axes = figure.add_subplot(xlabel="predicted", ylabel="true")
    axes.imshow(shares, cmap="Blues", vmin=0.0, vmax=1.0)
    axes.set_xticks(range(len(names)), names, rotation=90, parse_math=False)  # a dollar sign is text
    axes.set_yticks(range(len(names)), names, parse_math=False)
    if len(names) <= 30:
        for i, row in enumerate(matrix):
            for j, count in enumerate(row):
                colour = "white" if shares[i][j] > 0.5 else "black"
                axes.text(j, i, str(count), ha="center", va="center", color=colour, fontsize="small")
