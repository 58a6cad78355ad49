"""The log of a run: files that resume at their sizes, and a bar only on a terminal."""

import builtins
import io
import sys
from pathlib import Path

import pytest

from ffn.train.report import BASE_METRICS, Log, Screen, clock, draw_loss, printable

ROW = {"tokens": 5, "lr": 0.1, "train_loss": 1 / 3, "val_loss": None, "grad_norm": 1e-9}


def test_floats_are_written_exactly(tmp_path: Path) -> None:
    log = Log(tmp_path)
    log.metrics(step=1, **ROW)
    log.close()
    header, row = (tmp_path / "metrics.csv").read_text().splitlines()
    assert header == "step,tokens,lr,train_loss,val_loss,grad_norm"
    assert row == "1,5,0.1,0.3333333333333333,,1e-09"


def test_a_log_is_cut_back_to_its_sizes(tmp_path: Path) -> None:
    log = Log(tmp_path)
    log.metrics(step=1, **ROW)
    log.sample(1, "é")
    sizes = log.sizes()
    kept = {name: (tmp_path / name).read_bytes() for name in sizes}
    assert {name: len(content) for name, content in kept.items()} == sizes
    log.metrics(step=2, **ROW)
    log.timing(step=2, train_seconds=1.0, tokens_per_second=2.0)
    log.sample(2, "b")
    log.close()
    Log(tmp_path, sizes).close()
    assert {name: (tmp_path / name).read_bytes() for name in sizes} == kept


def test_lost_rows_of_a_log_are_said(tmp_path: Path) -> None:
    log = Log(tmp_path)
    header = log.sizes()["metrics.csv"]
    log.metrics(step=1, **ROW)
    first = log.sizes()["metrics.csv"]
    log.metrics(step=2, **ROW)
    sizes = log.sizes()
    log.close()
    file, said = tmp_path / "metrics.csv", []
    whole = file.read_bytes()
    file.write_bytes(whole[:-3])
    Log(tmp_path, sizes, say=said.append).close()
    assert file.read_bytes() == whole[:first], "whole lines"
    file.unlink()
    Log(tmp_path, sizes, say=said.append).close()
    assert file.read_bytes() == whole[:header], "a file that was taken away is begun again"
    assert [line.split()[:4] for line in said] == [
        [f"{file}:", str(left), "of", str(len(whole))] for left in (first, 0)
    ]


def test_draw_loss_returns_the_path_or_the_missing_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    Log(tmp_path).close()
    assert draw_loss(tmp_path) == f"loss curve   {tmp_path / 'loss.png'}"
    forbid(monkeypatch, "matplotlib")
    assert draw_loss(tmp_path).startswith("no loss.png: matplotlib")


def test_the_loss_on_the_text_of_the_base_is_logged_and_drawn(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    log = Log(tmp_path, metrics=BASE_METRICS)
    log.metrics(step=0, **{**ROW, "val_loss": 3.0}, base_val_loss=1.0)
    log.metrics(step=9, **{**ROW, "val_loss": 2.0}, base_val_loss=1.5)
    log.close()
    header, row, _ = (tmp_path / "metrics.csv").read_text().splitlines()
    assert header.endswith(",grad_norm,base_val_loss")
    assert row.endswith(",1.0")
    said: list[str] = []
    Screen(said.append, 9, 0).line(9, 1.25, 2.0, 3000.0, 0.0, 1.5)
    assert said == ["step 9/9  loss 1.2500  val 2.0000  base's text 1.5000  3,000 tokens/s  0:00 left"]
    axes = pytest.importorskip("matplotlib.axes").Axes
    drawn: list[tuple] = []
    monkeypatch.setattr(axes, "plot", lambda axes, x, y, style, label, **_: drawn.append((label, x, y)))
    monkeypatch.setattr(axes, "legend", lambda axes: None)
    draw_loss(tmp_path)
    assert ("validation", (0, 9), (3.0, 2.0)) in drawn
    assert ("validation, the base's text", (0, 9), (1.0, 1.5)) in drawn


def forbid(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    def without(name: str, *args, real=builtins.__import__, **kwargs):
        if name.split(".")[0] == package:
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def show(steps: int = 2) -> list[str]:
    said: list[str] = []
    screen = Screen(said.append, steps, 0)
    for step in range(1, steps + 1):
        screen.step(1.25, 3000.0)
        screen.line(step, 1.25, 2.5 if step == steps else None, 3000.0, 65.0)
    screen.sample("a\x1b[31mb\nc")
    screen.close()
    return said


def test_screen_prints_plain_lines_off_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert show() == [
        "step 1/2  loss 1.2500  3,000 tokens/s  1:05 left",
        "step 2/2  loss 1.2500  val 2.5000  3,000 tokens/s  1:05 left",
        "  | a\N{REPLACEMENT CHARACTER}[31mb\n  | c",
    ]
    assert sys.stderr.getvalue() == ""  # pyright: ignore[reportAttributeAccessIssue]


def test_screen_draws_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tqdm")
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert show()[0] == "step 2/2  loss 1.2500  val 2.5000"
    drawn = sys.stderr.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert "2/2" in drawn
    assert "loss 1.250, 3,000 tokens/s" in drawn


def test_screen_without_tqdm_prints_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    forbid(monkeypatch, "tqdm")
    said = show()
    assert said[0].startswith("no progress bar: tqdm")
    assert said[1].endswith("tokens/s  1:05 left")


def test_clock_and_printable() -> None:
    assert [clock(s) for s in (0.4, 75.3, 3675)] == ["0:00", "1:15", "1:01:15"]
    assert printable("é\n\t\x07\x1b") == "é\n\t" + "\N{REPLACEMENT CHARACTER}" * 2
