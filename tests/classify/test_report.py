"""Progress lines, metrics.csv, predictions.csv and pictures."""

import csv
import io
import sys
from pathlib import Path

import pytest
import torch

from ffn.classify.labelled import Labelled
from ffn.classify.loop import Outcome
from ffn.classify.objective import Objective
from ffn.classify.report import EpochScreen, draw, write_history, write_predictions
from tests.train.test_report import Terminal, forbid

ROW = {"epoch": 1, "train_loss": 1.5, "loss": 1.25, "accuracy": 0.5, "seconds": 61.0}
OUTCOMES = {7: Outcome([ROW, {**ROW, "epoch": 2, "accuracy": 0.75}], 0.75, 2), 8: Outcome([ROW], 0.5, 1)}
OBJECTIVE = Objective("cross_entropy", ("café", "猫"))
TARGETS = torch.tensor([0, 1, 1])
PREDICTIONS = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.4, 0.6]], dtype=torch.float64)


def rows(*labels) -> Labelled:
    return Labelled(("a", "b, c", "d\ne"), labels, tuple((Path("x.csv"), n) for n in (2, 3, 4)))


def test_each_epoch_prints_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    said: list[str] = []
    progress = EpochScreen(said.append, 4, 2, "accuracy")
    progress.step(1.0, 2.0)
    progress.epoch(ROW, True)
    progress.epoch({**ROW, "epoch": 2}, False)
    EpochScreen(said.append, 4, 2, "loss").epoch(ROW, True)
    assert said == [
        "epoch 1/2  loss 1.5000  val 1.2500  accuracy 0.5000  1:01  best so far",
        "epoch 2/2  loss 1.5000  val 1.2500  accuracy 0.5000  1:01",
        "epoch 1/2  loss 1.5000  val 1.2500  1:01  best so far",
    ]


def test_the_bar_shows_loss_and_metric(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tqdm")
    monkeypatch.setattr(sys, "stderr", Terminal())
    progress = EpochScreen(lambda _: None, 2, 2, "accuracy")
    progress.step(1.0, 200.0)
    progress.epoch(ROW, True)
    progress.step(0.5, 100.0)
    progress.close()
    assert "loss 0.500, accuracy 0.5000, 100 texts/s" in sys.stderr.getvalue()  # type: ignore[attr-defined]


def test_the_history_has_a_row_per_seed_and_epoch(tmp_path: Path) -> None:
    write_history(tmp_path / "m.csv", OUTCOMES)
    with (tmp_path / "m.csv").open() as file:
        found = list(csv.DictReader(file))
    assert [(row["seed"], row["epoch"], row["accuracy"]) for row in found] == [
        ("7", "1", "0.5"), ("7", "2", "0.75"), ("8", "1", "0.5"),
    ]  # fmt: skip


def test_the_worst_mistakes_come_first(tmp_path: Path) -> None:
    write_predictions(tmp_path / "p.csv", rows("café", "猫", "猫"), OBJECTIVE, TARGETS, PREDICTIONS)
    with (tmp_path / "p.csv").open(encoding="utf-8", newline="") as file:
        found = list(csv.DictReader(file))
    assert found[0] == {
        "label": "猫", "predicted": "café", "probability": "0.800000", "of_label": "0.200000", "text": "b, c",
        "file": "x.csv", "line": "3",
    }  # fmt: skip
    assert [row["text"] for row in found] == ["b, c", "d\ne", "a"]


def test_mistakes_come_before_uncertain_correct_rows(tmp_path: Path) -> None:
    three = torch.tensor([[0.4, 0.3, 0.3], [0.5, 0.45, 0.05], [0.9, 0.1, 0.0]], dtype=torch.float64)
    objective, targets = Objective("cross_entropy", ("a", "b", "c")), torch.tensor([0, 1, 0])
    write_predictions(tmp_path / "p.csv", rows("a", "b", "a"), objective, targets, three)
    with (tmp_path / "p.csv").open(newline="") as file:
        found = [(row["label"], row["predicted"], row["probability"]) for row in csv.DictReader(file)]
    assert found == [("b", "a", "0.500000"), ("a", "a", "0.400000"), ("a", "a", "0.900000")]


def test_the_largest_squared_errors_come_first(tmp_path: Path) -> None:
    targets, values = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.5, 2.0, 1.0], dtype=torch.float64)
    write_predictions(tmp_path / "p.csv", rows(1.0, 2.0, 3.0), Objective("mse"), targets, values)
    with (tmp_path / "p.csv").open(newline="") as file:
        found = [(row["label"], row["predicted"], row["squared_error"]) for row in csv.DictReader(file)]
    assert found == [("3.0", "1.0", "4.0"), ("1.0", "1.5", "0.25"), ("2.0", "2.0", "0.0")]


def test_draw_returns_false_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forbid(monkeypatch, "matplotlib")
    assert not draw(tmp_path, OUTCOMES, "accuracy", OBJECTIVE.scores(TARGETS, PREDICTIONS))


@pytest.mark.parametrize("name", ["$a_{$", "$x^", "a\nb", "\x07", "long " * 200])
def test_class_names_are_drawn_as_text(name: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    objective = Objective("cross_entropy", (name, "$b$"))
    assert draw(tmp_path, OUTCOMES, "accuracy", objective.scores(TARGETS, PREDICTIONS))
    assert (tmp_path / "confusion.png").read_bytes().startswith(b"\x89PNG")
