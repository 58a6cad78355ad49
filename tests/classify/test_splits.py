"""Splits are given or split off; wrong input gives one line."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ffn.classify.batches import TextEncoder
from ffn.classify.splits import read_splits
from ffn.text.tokenizer import ByteTokenizer
from tests.classify.samples import config, quiet, texts, write_table


def test_missing_splits_are_split_off(tmp_path: Path) -> None:
    said: list[str] = []
    splits = read_splits(config(tmp_path), said.append)
    assert {name: len(rows) for name, rows in splits.rows.items()} == {"train": 72, "val": 9, "test": 9}
    assert splits.objective.classes == ("food", "music", "sea")
    assert said == ["data         72 train, 9 val, 9 test; 3 classes"]
    assert all(torch.equal(numbers.bincount() * 3, torch.full((3,), len(numbers)))
               for numbers in splits.targets.values())  # fmt: skip
    again = read_splits(config(tmp_path), quiet)
    assert again.rows == splits.rows
    assert read_splits(config(tmp_path, "data.seed=1"), quiet).rows != splits.rows


def test_given_splits_are_used(tmp_path: Path) -> None:
    val = write_table(tmp_path / "val.csv", texts(12, seed=5))
    test = write_table(tmp_path / "test.csv", texts(6, seed=6))
    splits = read_splits(config(tmp_path, f"data.val={val}", f"data.test={test}"), quiet)
    assert {name: len(rows) for name, rows in splits.rows.items()} == {"train": 90, "val": 12, "test": 6}
    splits = read_splits(config(tmp_path, f"data.test={test}", "data.val_fraction=0.2"), quiet)
    assert {name: len(rows) for name, rows in splits.rows.items()} == {"train": 72, "val": 18, "test": 6}


def test_texts_shared_with_training_are_counted(tmp_path: Path) -> None:
    test = write_table(tmp_path / "test.csv", [*texts(90)[:10], ("a new one", "sea")])
    said: list[str] = []
    splits = read_splits(config(tmp_path, f"data.test={test}"), said.append)
    found = splits.counts["test_in_train"]
    assert 0 < found <= 10
    assert said[-1] == f"warning: {found} of 11 test texts also occur in the training texts"
    assert splits.counts["val_in_train"] == 0


def test_skip_empty_skips_rows_without_text(tmp_path: Path) -> None:
    write_table(tmp_path / "texts.csv", [*texts(90), (" ", "sea"), ("", "food")])
    said: list[str] = []
    splits = read_splits(config(tmp_path, "data.skip_empty=true"), said.append)
    assert splits.counts["train_skipped"] == 2
    assert said[0] == f"warning: 2 rows of {tmp_path / 'texts.csv'} have no text and are skipped"
    with pytest.raises(ValueError, match=r"texts.csv:92: empty text"):
        read_splits(config(tmp_path), quiet)


def test_truncated_texts_are_counted(tmp_path: Path) -> None:
    splits, said = read_splits(config(tmp_path), quiet), []
    sources = splits.encode(TextEncoder(ByteTokenizer(), 20), 0.25, said.append)
    cut = sum(len(text) > 20 for text in splits.rows["train"].texts)
    assert splits.counts["train_truncated"] == cut > 0
    assert said[0] == f"warning: {cut} of 72 train texts are truncated to 20 tokens"
    assert max(sources["train"].lengths) == 20
    assert sources["train"].word_dropout == 0.25


def test_regression_targets_are_scaled_by_the_training_split(tmp_path: Path) -> None:
    rows = [(text, 100 + 10 * len(text)) for text, _ in texts(50)]
    write_table(tmp_path / "texts.csv", rows)
    splits = read_splits(config(tmp_path, "train.loss=mse"), quiet)
    numbers = splits.targets["train"]
    assert numbers.dtype == torch.float64
    assert splits.objective.center == pytest.approx(numbers.mean().item())
    assert splits.objective.scale == pytest.approx(numbers.std(correction=0).item())
    write_table(tmp_path / "texts.csv", [(text, 5) for text, _ in texts(50)])
    assert read_splits(config(tmp_path, "train.loss=mse"), quiet).objective.scale == 1.0


Rows = list[tuple[str, object]]


@pytest.mark.parametrize(
    ("change", "words", "message"),
    [
        (lambda rows: rows, ["data.label=stars"], r"texts\.csv:1: .*'stars'"),
        (lambda rows: [(text, "one") for text, _ in rows], [], r"two classes .*'one'$"),
        (lambda rows: [*rows[:4], ("only a text",)], [], r"texts\.csv:6: "),
        (lambda rows: [*rows, ("", "sea")], [], r"texts\.csv:92: empty text"),
        (lambda rows: rows[:4], [], r"."),
        (lambda rows: rows, ["train.loss=binary_cross_entropy"], r"^train.loss=binary_cross_entropy"),
        (lambda rows: rows, ["train.metric=roc_auc"], r"^train.metric=roc_auc"),
        (lambda rows: rows, ["train.loss=mse"], r"texts\.csv:2: .*number"),
        (lambda rows: rows, ["train.class_weights=sea:2"], r"^train.class_weights: .* food, music$"),
        (lambda rows: rows, ["data.val_fraction=0.5", "data.test_fraction=0.5"], r"^data.val_fraction"),
        (lambda rows: rows, ["data.path="], r"^data.path"),
        (lambda rows: rows, ["data.path=/nowhere/x.csv"], r"^/nowhere/x.csv: "),
    ],
)
def test_wrong_input_gives_one_line(
    change: Callable[[Rows], Rows], words: list[str], message: str, tmp_path: Path
) -> None:
    write_table(tmp_path / "texts.csv", change(list(texts(90))))
    with pytest.raises(ValueError, match=message) as caught:
        read_splits(config(tmp_path, *words), quiet)
    assert "\n" not in str(caught.value)


def test_quotes_false_reads_quotes_as_text(tmp_path: Path) -> None:
    settings = config(tmp_path)
    file = tmp_path / "texts.csv"
    file.write_text(file.read_text() + '"a wave,sea\n')
    with pytest.raises(ValueError, match=r"texts\.csv:92: .*quotes=false"):
        read_splits(settings, quiet)
    splits = read_splits(config(tmp_path, "data.quotes=false"), quiet)
    assert '"a wave' in [text for rows in splits.rows.values() for text in rows.texts]


def test_an_unknown_test_label_is_named_with_its_line(tmp_path: Path) -> None:
    test = write_table(tmp_path / "test.csv", [*texts(3, seed=9), ("what", "seas")])
    with pytest.raises(ValueError, match=r"test\.csv:5: unknown label 'seas'.*sea"):
        read_splits(config(tmp_path, f"data.test={test}"), quiet)
