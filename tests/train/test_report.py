"""Reports: files that grow and go on where they were, and a screen that is plain unless it is a terminal."""

import builtins
import io
import sys
from pathlib import Path

import pytest

from ffn.train.report import BASE_METRICS, Log, Screen, clock, draw_loss, printable

ROW = {"tokens": 5, "lr": 0.1, "train_loss": 1 / 3, "val_loss": None, "grad_norm": 1e-9}


def test_floats_are_written_to_the_last_bit(tmp_path: Path) -> None:
    log = Log(tmp_path)
    log.metrics(step=1, **ROW)
    log.close()
    header, row = (tmp_path / "metrics.csv").read_text().splitlines()
    assert header == "step,tokens,lr,train_loss,val_loss,grad_norm"
    assert row == "1,5,0.1,0.3333333333333333,,1e-09"


def test_a_log_goes_on_from_its_sizes(tmp_path: Path) -> None:
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


def test_what_is_lost_of_a_log_is_told(tmp_path: Path) -> None:
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
    lost = f"of {len(whole)} bytes are left; the run goes on from there"
    assert said == [f"{file}: {first} {lost}", f"{file}: 0 {lost}"]


def test_the_loss_is_drawn_or_a_line_says_why_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    log = Log(tmp_path)
    log.close()
    assert draw_loss(tmp_path) == f"loss curve   {tmp_path / 'loss.png'}"
    log = Log(tmp_path)
    log.metrics(step=1, **ROW)
    log.metrics(step=2, **{**ROW, "val_loss": 0.5})
    log.close()
    draw_loss(tmp_path)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    forbid(monkeypatch, "matplotlib")
    assert draw_loss(tmp_path) == "no loss.png: that wants matplotlib, pip install 'torch-ffn[app]'"


def test_a_base_has_a_column_a_curve_and_a_place_on_the_line(tmp_path: Path, monkeypatch) -> None:
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


def test_off_a_terminal_there_are_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert show() == [
        "step 1/2  loss 1.2500  3,000 tokens/s  1:05 left",
        "step 2/2  loss 1.2500  val 2.5000  3,000 tokens/s  1:05 left",
        "  | a\N{REPLACEMENT CHARACTER}[31mb\n  | c",
    ]
    assert sys.stderr.getvalue() == ""  # pyright: ignore[reportAttributeAccessIssue]


def test_on_a_terminal_there_is_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tqdm")
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert show()[0] == "step 2/2  loss 1.2500  val 2.5000"
    drawn = sys.stderr.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert "2/2" in drawn
    assert "loss 1.250, 3,000 tokens/s" in drawn


def test_without_tqdm_a_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    forbid(monkeypatch, "tqdm")
    said = show()
    assert said[0] == "no progress bar: that wants tqdm, pip install 'torch-ffn[app]'"
    assert said[1].endswith("tokens/s  1:05 left")


def test_clock_and_printable() -> None:
    assert [clock(s) for s in (0.4, 75.3, 3675)] == ["0:00", "1:15", "1:01:15"]
    assert printable("é\n\t\x07\x1b") == "é\n\t" + "\N{REPLACEMENT CHARACTER}" * 2
