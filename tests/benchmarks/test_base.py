"""--base with two commits of a tiny `ffn`; the second is slow, wrong or fatal by number of tokens."""

import math
import random
import shutil
import signal
import subprocess
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import base
from benchmarks.cases import Block, Case

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")

BLOCK = Block("toy", 4, 8, "gelu", bias=True, source="none")
SAME, SLOWER, FASTER, WRONG, REFUSED, FATAL = range(1, 7)  # the numbers of tokens, named by their effect

ACTIVATIONS = """
from types import SimpleNamespace

TABLE = {"gelu": SimpleNamespace(gated=False)}
GATES = {}
"""
FFN = """
import os, random, time
from torch import nn

LATER = False
print("this must not be taken for an answer")

class FeedForward(nn.Linear):  # from 4 to 4
    def forward(self, x):
        tokens = len(x)
        if LATER and tokens == 5:
            raise NotImplementedError("no such block")
        if LATER and tokens == 6:
            os._exit(3)
        time.sleep(random.uniform(0.003, 0.005) * {2: 1 + 2 * LATER, 3: 3 - 2 * LATER}.get(tokens, 1))
        return super().forward(x) + (1e-3 if LATER and tokens == 4 else 0)
"""
TABLE = """
from contextlib import nullcontext
from types import SimpleNamespace

def build(case, weights):
    from ffn import FeedForward

    module = FeedForward(4, 4)
    module.load_state_dict({"weight": weights["up_proj.weight"][:4], "bias": weights["up_proj.bias"][:4]})
    gradients = lambda: {"weight": module.weight.grad}
    return SimpleNamespace(module=module, gradients=gradients, setting=nullcontext, note="")

IMPLEMENTATIONS = {"ffn": build}
"""


def git(root: Path, *words: str) -> str:
    author = ["-c", "user.name=A", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(root), *author, *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def only_the_checkout_is_left(root: Path) -> bool:
    return len(git(root, "worktree", "list").splitlines()) == 1


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Two commits, "first" and "second"."""
    files = {"ffn/__init__.py": FFN, "ffn/activations.py": ACTIVATIONS, "fake_table.py": TABLE}
    files["benchmarks/__init__.py"] = "raise ImportError('the benchmark code is not taken from a commit')"
    for folder in ("ffn", "benchmarks"):
        (tmp_path / folder).mkdir()
    git(tmp_path, "init", "-q")
    for tag in ("first", "second"):
        for file, text in files.items():
            (tmp_path / file).write_text(text.replace("LATER = False", f"LATER = {tag == 'second'}"))
        git(tmp_path, "add", ".")
        git(tmp_path, "commit", "-q", "-m", tag)
        git(tmp_path, "tag", tag)
    return tmp_path


def compared(root: Path, rev: str, *tokens: int) -> list[dict]:
    cases = [Case(BLOCK, n) for n in tokens]
    return base.run(rev, cases, sittings=2, root=root, implementations="fake_table")


def test_base_finds_the_changes_between_two_commits(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "ROUNDS", (3, 3))
    tokens = (SAME, SLOWER, FASTER, WRONG, REFUSED, FATAL, SLOWER)
    rows = compared(repository, "first", *tokens)
    same, slower, faster, wrong, refused, fatal, again = rows
    assert same["verdict"] != "not timed"
    for row in (slower, again):  # the second one after a worker died
        assert row["verdict"] == "slower"
        assert row["low"] <= row["speedup"] <= row["high"] < 1
        assert row["note"] == ""
    assert faster["verdict"] == "faster"
    assert faster["after_ms"] < faster["before_ms"]
    assert wrong["note"].startswith("y differs by ")
    assert refused["note"] == "after: NotImplementedError: no such block"
    assert fatal["note"] == "after: the process ended with code 3"
    assert refused["verdict"] == fatal["verdict"] == "not timed"
    assert only_the_checkout_is_left(repository)


def run_main(monkeypatch: pytest.MonkeyPatch, root: Path, rev: str, *tokens: int) -> None:
    ours = partial(base.run, sittings=2, root=root, implementations="fake_table")
    monkeypatch.setattr(base, "run", ours)
    base.main(rev, [Case(BLOCK, n) for n in tokens], ["ffn"], device="cpu", budget=60.0)


def test_verdict_is_printed(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(base, "ROUNDS", (3, 3))
    run_main(monkeypatch, repository, "first", SLOWER, REFUSED)
    *lines, _, counts = capsys.readouterr().out.splitlines()
    assert counts == "0 faster, 1 slower, 0 within the noise, 1 not timed"
    assert any("| slower |" in line for line in lines)
    assert any("NotImplementedError: no such block" in line for line in lines)


def test_nan_is_a_disagreement() -> None:
    good, bad = {"y": torch.ones(3), "x": torch.ones(2)}, torch.tensor([1.0, math.nan])
    assert base.disagreement(good, good, "float32") == ""
    assert base.disagreement(good, good | {"x": bad}, "float32") == "the gradient of x differs by nan"
    assert base.disagreement({"y": bad}, {"y": torch.ones(2)}, "bfloat16") == "y differs by nan"
    assert base.disagreement(good, {"y": torch.ones(3)}, "float32").startswith("the outputs differ")


class Steady:
    """A fake worker: its process is slower by up to a fifth, each turn by up to a tenth."""

    def __init__(self, side: str, draw: random.Random, seconds: float = 1.0):
        self.side, self.draw = side, draw
        self.typical = seconds * draw.uniform(1.0, 1.2)

    def prepare(self, *case: object) -> dict:
        return {}

    def seconds(self) -> float:
        return self.typical * self.draw.uniform(1.0, 1.1)


@pytest.mark.parametrize(
    ("seconds", "verdict"), [(1.0, "within the noise"), (1.3, "slower"), (0.7, "faster")]
)
def test_verdicts_are_right_in_nine_of_ten_cases(seconds: float, verdict: str, tmp_path: Path) -> None:
    draw, verdicts = random.Random(0), []
    for _ in range(100):
        pair = base.Pair(Case(BLOCK, SAME), "ffn")
        for _ in range(base.SITTINGS):
            pair.sit([Steady("before", draw), Steady("after", draw, seconds)], tmp_path, 0.0)
        verdicts.append(pair.row()["verdict"])
    assert verdicts.count(verdict) >= 90


def test_absent_commit_raises(
    repository: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"^--base nowhere "):
        compared(repository, "nowhere", SAME)
    with pytest.raises(ValueError, match=r"^--base HEAD .*not a git repository"):
        compared(tmp_path_factory.mktemp("elsewhere"), "HEAD", SAME)
    with pytest.raises(SystemExit, match=r"^python -m benchmarks: --base nowhere "):
        run_main(monkeypatch, repository, "nowhere", SAME)


def test_cases_beyond_the_budget_are_skipped(monkeypatch: pytest.MonkeyPatch, repository: Path) -> None:
    monkeypatch.setattr(base.Pair, "sit", lambda pair, *_: pair.fail("sat"))
    cases = [Case(BLOCK, SAME), Case(BLOCK, SLOWER)]
    rows = base.run("first", cases, budget=-1.0, root=repository)
    assert [row["note"] for row in rows] == ["sat", "skipped: the budget of -1 s is spent"]


@pytest.fixture
def usual_signals():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore it
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("usual_signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_removes_worktree_and_workers(
    number: signal.Signals, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []

    def interrupted(worker: base.Worker, *case: object) -> None:
        started.append(worker.process)
        signal.raise_signal(number)

    monkeypatch.setattr(base.Worker, "prepare", interrupted)
    with pytest.raises(SystemExit, match=r"^stopped before there is a verdict$"):
        run_main(monkeypatch, repository, "first", SAME)
    assert only_the_checkout_is_left(repository)
    assert started[0].returncode is not None
