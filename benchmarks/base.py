"""Compare the block of the working tree with another commit's, and list significant changes of speed.

python -m benchmarks [SUITE] --base REV

The commit is checked out in a temporary worktree. Two processes run the benchmark code of the working tree,
each with the `ffn` of its own tree. They take turns in an order shuffled each round, so that a slow minute
affects both. The memory layout of a process moves its times by up to a third for its whole life; therefore
there are several sittings with new processes, and only the medians of sittings count. `speedup` is that of
the working tree over the commit, with a 95% bootstrap interval over the sittings; a case changed if the
interval excludes 1. Each sitting reads the working tree again, so do not edit it during the run.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch

from benchmarks.cases import WRONG, Case
from benchmarks.report import CASE, table
from benchmarks.timing import measure, relative_error, speedup

ROOT = Path(__file__).resolve().parents[1]
SIDES = ("before", "after")  # the commit, the working tree
SITTINGS = 8  # with 8 the interval of an unchanged case excludes 1 in one of twenty, with 3 in one of four
ROUNDS = (2, 20)  # least and most rounds in a sitting
VERDICTS = ("faster", "slower", "within the noise", "not timed")
COLUMNS = [*CASE, "before_ms", "after_ms", "speedup", "low", "high", "verdict", "note"]


def git(root: Path, *words: str, check: bool = True) -> str:
    command = ["git", "-C", os.fspath(root), *words]
    return subprocess.run(command, capture_output=True, text=True, check=check).stdout.strip()


@contextmanager
def checked_out(root: Path, rev: str) -> Iterator[Path]:
    """Check the commit out in a temporary worktree.

    Raises:
        ValueError: if the commit does not exist or `root` is not a git checkout.
    """
    try:
        commit = git(root, "rev-parse", "--verify", "--end-of-options", f"{rev}^{{commit}}")
    except FileNotFoundError:
        raise ValueError(f"--base {rev} needs git, which is not installed") from None
    except subprocess.CalledProcessError as error:
        why = error.stderr.strip().splitlines()[-1].removeprefix("fatal: ")
        raise ValueError(f"--base {rev} must be a commit of {root}: {why}") from None
    with TemporaryDirectory(prefix="ffn-base-") as folder:
        tree = Path(folder).resolve() / "tree"
        try:
            git(root, "worktree", "add", "--detach", os.fspath(tree), commit)
            yield tree
        finally:  # forced twice: half made, it is still locked
            git(root, "worktree", "remove", "--force", "--force", os.fspath(tree), check=False)


# By default it depends on the heap's layout, so on chance, whether glibc returns freed memory to the system,
# and the next call must fault it in again. With these settings glibc never returns it.
ALLOCATOR = {"MALLOC_TRIM_THRESHOLD_": str(1 << 40), "MALLOC_MMAP_MAX_": "0"}


class Failure(RuntimeError):
    """A request failed in the worker."""


class Worker:
    """A process of `benchmarks.worker` with the `ffn` of one tree; restarted after it dies."""

    def __init__(self, side: str, root: Path, implementations: str, device: str):
        self.side = side
        self.words = (os.fspath(root), implementations, device)
        self.start()

    def start(self) -> None:
        path = os.pathsep.join(filter(None, [os.fspath(ROOT), os.environ.get("PYTHONPATH")]))
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-P",
                "-m",
                "benchmarks.worker",
                *self.words,
            ],  # -P: do not import `ffn` from the folder
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**ALLOCATOR, **os.environ, "PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C goes to this process only, which ends its workers
        )

    def ask(self, *request: object):
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # the process is dead, so it sends no answer either
        line = self.process.stdout.readline()
        if not line:
            raise Failure(f"{self.side}: the process ended with code {self.process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise Failure(f"{self.side}: {answer['error']}")
        return answer["answer"]

    def prepare(self, case: Case, name: str, folder: Path) -> dict[str, torch.Tensor]:
        """Prepare a case for timing and return samples of the implementation's outputs."""
        if self.process.poll() is not None:
            self.end()
            self.start()
        outputs = folder / f"{self.side}.pt"
        self.ask("prepare", asdict(case), name, os.fspath(outputs))
        return torch.load(outputs)

    def seconds(self) -> float:
        return self.ask("seconds")

    def end(self) -> None:
        self.process.kill()
        with self.process:  # waits, and closes the pipes
            pass


@contextmanager
def at_work(trees: dict[str, Path], implementations: str, device: str) -> Iterator[list[Worker]]:
    workers: list[Worker] = []
    try:
        for side, tree in trees.items():
            workers.append(Worker(side, tree, implementations, device))
        yield workers
    finally:
        for worker in workers:
            worker.end()


def disagreement(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor], dtype: str) -> str:
    """Describe a difference between the trees' outputs beyond rounding; empty if there is none."""
    was, now = ({name: (t.shape, t.dtype) for name, t in side.items()} for side in (before, after))
    if was != now:
        return "the outputs differ in shape or dtype"
    for name, old in before.items():
        error = 0.0 if torch.equal(old, after[name]) else relative_error(after[name].double(), old.double())
        if not error <= WRONG[dtype]:  # NaN fails, too
            return f"{name if name == 'y' else f'the gradient of {name}'} differs by {error:.1e}"
    return ""


@dataclass
class Pair:
    """An implementation of a case on both sides: median seconds per sitting, or a note without them."""

    case: Case
    name: str
    medians: dict[str, list[float]] = field(default_factory=lambda: {side: [] for side in SIDES})
    note: str = ""
    failed: bool = False

    def sit(self, workers: Sequence[Worker], folder: Path, seconds: float) -> None:
        """Check that both sides compute the same, then time them in turn for about `seconds`."""
        try:
            before, after = (worker.prepare(self.case, self.name, folder) for worker in workers)
            self.note = disagreement(before, after, self.case.dtype)
            turns = {worker.side: worker.seconds for worker in workers}
            begun = time.monotonic()
            measure(turns, rounds=0, warmup=1, clock=taken)
            rounds = int(seconds / max(time.monotonic() - begun, 1e-6))
            rounds = max(ROUNDS[0], min(ROUNDS[1], rounds))
            for side, seen in measure(turns, rounds=rounds, warmup=0, clock=taken).items():
                self.medians[side].append(median(seen))
        except Failure as error:
            self.fail(str(error))

    def fail(self, note: str) -> None:
        self.note, self.failed = note, True

    def row(self) -> dict:
        row = {**self.case.columns(), "implementation": self.name, "note": self.note}
        if self.failed:
            return {**row, "verdict": "not timed"}
        ratio, low, high = speedup(*(self.medians[side] for side in SIDES))
        row |= {f"{side}_ms": 1e3 * median(self.medians[side]) for side in SIDES}
        verdict = "faster" if low > 1 else "slower" if high < 1 else "within the noise"
        return {**row, "speedup": ratio, "low": low, "high": high, "verdict": verdict}


def taken(turn: Callable[[], float]) -> float:
    """Clock: return the time that the worker measured."""
    return turn()


def summary(rows: list[dict]) -> str:
    """Return a table of the cases that changed or have a note, and the count of each verdict."""
    shown = [row for row in rows if row["verdict"] != "within the noise" or row["note"]]
    shown.sort(key=lambda row: row.get("speedup", 0.0))
    verdicts = [row["verdict"] for row in rows]
    counts = ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in VERDICTS)
    return f"{table(shown, COLUMNS)}\n\n{counts}" if shown else counts


def run(
    rev: str,
    cases: Sequence[Case],
    names: Sequence[str] = ("ffn",),
    *,
    device: str = "cpu",
    budget: float = 60.0,
    sittings: int = SITTINGS,
    root: Path = ROOT,
    implementations: str = "benchmarks.implementations",
) -> list[dict]:
    """Return a row per case and implementation, in about `budget` seconds; later cases are skipped.

    Raises:
        ValueError: if the commit does not exist or `root` is not a git checkout.
    """
    pairs = [Pair(case, name) for case in cases for name in names]
    with checked_out(root, rev) as tree, TemporaryDirectory() as folder:
        for sitting in range(sittings):
            begun = time.monotonic()
            with at_work({"before": tree, "after": root}, implementations, device) as workers:
                todo = [pair for pair in pairs if not pair.failed]
                for number, pair in enumerate(todo):
                    left = budget / sittings - (time.monotonic() - begun)
                    if left < 0 and sitting == 0 and number:  # the other sittings will take as long
                        pair.fail(f"skipped: the budget of {budget:.0f} s is spent")
                        continue
                    print(f"{sitting + 1}/{sittings} {pair.case}, {pair.name}", file=sys.stderr, flush=True)
                    pair.sit(workers, Path(folder), left / (len(todo) - number))
    return [pair.row() for pair in pairs]


def main(rev: str, cases: Sequence[Case], names: Sequence[str], *, device: str, budget: float) -> None:
    """Print the changes, the failures and their counts."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the worktree is removed then, too
    try:
        rows = run(rev, cases, names, device=device, budget=budget)
    except ValueError as error:
        raise SystemExit(f"python -m benchmarks: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("stopped before there is a verdict") from None
    print(summary(rows))
