"""Killed at any moment and started again, a run ends as one that was never killed: the same bytes."""

import json
import math
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ffn.train.loop import train
from tests import tiny
from tests.conftest import ROOT
from tests.tiny import outcome, quiet

WORDS = [
    "train.steps=200",
    "train.checkpoint_every=5",
    "train.eval_every=50",
    "train.accumulate=2",
    "train.log_every=3",
]

# One process that has imported everything forks a child for each attempt: a run of its own, killed by SIGKILL
# without ten imports of torch. What to do comes as JSON.
FORK = """
import json, os, signal, sys, time, traceback
from pathlib import Path
import torch._dynamo
from ffn.train.loop import train
from tests import tiny

folder, words, delays, flushes = json.loads(sys.argv[1])
config = tiny.config(Path(folder), *words)

def child(before=lambda: None):
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        before()
        train(config, lambda line: None)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)

def die_at(flush):
    real, calls = os.fsync, iter(range(10**9))
    def fsync(descriptor):
        if next(calls) == flush:
            os.kill(os.getpid(), signal.SIGKILL)
        real(descriptor)
    os.fsync = fsync

ends = []
for delay in delays:
    pid = child()
    time.sleep(delay)
    os.kill(pid, signal.SIGKILL)
    ends.append(os.waitpid(pid, 0)[1])
for flush in flushes:
    ends.append(os.waitpid(child(lambda: die_at(flush)), 0)[1])
start = time.perf_counter()
ends.append(os.waitpid(child(), 0)[1])
print(json.dumps([ends, time.perf_counter() - start]))
"""


def run_and_kill(
    folder: Path, words: list[str], delays: list[float], flushes: list[int]
) -> tuple[list[int], float]:
    """How each process ended (9: by SIGKILL, 0: well), the last one unharmed, and the seconds it took."""
    argument = json.dumps([str(folder), words, delays, flushes])
    done = subprocess.run(
        [sys.executable, "-c", FORK, argument],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="wants fork")
def test_killed_ten_times_at_random(tmp_path: Path) -> None:
    ends, seconds = run_and_kill(tmp_path, [*WORDS, f"out={tmp_path / 'whole'}"], [], [])
    assert ends == [0]
    delays = [random.uniform(0.02, seconds / 15) for _ in range(10)]  # the eleventh start finds work left
    ends, _ = run_and_kill(tmp_path, WORDS, delays, [])
    assert ends == [9] * 10 + [0]
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {path.name for path in (tmp_path / "whole").iterdir()}, "nothing half-written is left"


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="wants fork")
def test_killed_at_every_flush_to_the_disk(tmp_path: Path) -> None:
    words = ["train.steps=8", "train.checkpoint_every=2", "train.eval_every=4"]
    train(tiny.config(tmp_path, *words, f"out={tmp_path / 'whole'}"), quiet)
    ends, _ = run_and_kill(tmp_path, words, [], list(range(45)))
    assert ends[-1] == 0
    assert ends.count(9) >= 20
    assert set(ends) == {0, 9}
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(name: str, tmp_path: Path) -> None:
    whole = tiny.config(tmp_path, f"out={tmp_path / 'whole'}")
    train(whole, quiet)
    config = tiny.config(tmp_path)
    shutil.copytree(whole.out, config.out)
    file = Path(config.out) / "checkpoints" / "step-000012" / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    said: list[str] = []
    train(config, said.append)
    assert any(line.startswith(f"checkpoint step-000012 refused: {name}") for line in said)
    assert any(line.startswith("going on     ") and line.endswith("step-000008") for line in said)
    assert outcome(Path(config.out)) == outcome(Path(whole.out))


@pytest.mark.parametrize("tokens", ["kept", "lost"])
def test_without_a_good_checkpoint_nothing_is_begun_anew(tokens: str, tmp_path: Path) -> None:
    config = tiny.config(tmp_path)
    train(config, quiet)
    for state in Path(config.out).rglob("state.json"):
        state.write_text("{}")
    train_bin = Path(config.out) / "data" / "train.bin"
    if tokens == "lost":
        train_bin.unlink()
    before = outcome(Path(config.out))
    with pytest.raises(ValueError, match=r"no checkpoint in .* is good; to start anew give another folder"):
        train(config, quiet)
    assert outcome(Path(config.out)) == before
    assert train_bin.exists() == (tokens == "kept")


def test_a_run_goes_on_with_the_tokens_it_began_with(tmp_path: Path) -> None:
    """The text may change or vanish; lost tokens are made again only from the same text."""
    whole = tiny.config(tmp_path, f"out={tmp_path / 'whole'}")
    train(whole, quiet)
    config = tiny.config(tmp_path)
    shutil.copytree(whole.out, config.out)
    shutil.rmtree(Path(config.out) / "checkpoints" / "step-000012")
    (tmp_path / "text.txt").write_text("another text altogether, " * 100)
    train(config, quiet)
    assert outcome(Path(config.out)) == outcome(Path(whole.out))
    data = Path(config.out) / "data"
    (data / "train.bin").unlink()
    before = {path: path.read_bytes() for path in data.iterdir()}
    with pytest.raises(ValueError, match=r"not the text that .* began with"):
        train(config, quiet)
    assert {path: path.read_bytes() for path in data.iterdir()} == before
    (tmp_path / "text.txt").write_text(tiny.TEXT)
    shutil.rmtree(Path(config.out) / "checkpoints" / "step-000012")
    train(config, quiet)
    assert outcome(Path(config.out)) == outcome(Path(whole.out))


def test_a_refused_checkpoint_is_not_called_the_last_good_one(tmp_path: Path, monkeypatch) -> None:
    config = tiny.config(tmp_path)
    train(config, quiet)
    (Path(config.out) / "checkpoints" / "step-000012" / "state.json").write_text("{}")
    monkeypatch.setattr("ffn.train.loop.accumulate_gradients", lambda *_: math.nan)
    with pytest.raises(FloatingPointError, match=r"the last good checkpoint is .*step-000008;"):
        train(config, quiet)


def test_other_threads_or_versions_are_mentioned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny.config(tmp_path)
    train(config, quiet)
    shutil.rmtree(Path(config.out) / "checkpoints" / "step-000012")
    monkeypatch.setattr("torch.get_num_threads", lambda: 99)
    said: list[str] = []
    train(config, said.append)
    assert any("not the same to the last bit" in line and "now 99" in line for line in said)
