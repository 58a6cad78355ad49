"""Whole runs of about a second: the files they leave, what stops them, and what they refuse."""

import csv
import errno
import json
import math
import os
import shutil
import signal
import sysconfig
from pathlib import Path

import pytest
import torch

import ffn.train.loop
from ffn.disk import load
from ffn.text.corpus import prepare
from ffn.train.loop import train
from ffn.train.run_folder import read_config
from ffn.train.steps import evaluate
from tests import tiny
from tests.tiny import outcome, quiet


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_run_writes_its_files_and_summary(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    config = tiny.config(tmp_path, "train.steps=40", "train.eval_every=20", "train.eval_batches=0")
    said: list[str] = []
    summary = train(config, said.append)
    run = Path(config.out)
    names = {path.name for path in run.iterdir()}
    files = ["config.toml", "tokenizer.json", "metrics.csv", "timing.csv", "loss.png", "samples.txt"]
    assert names == {*files, "summary.json", "checkpoints", "data", ".lock"}
    assert json.loads((run / "summary.json").read_text()) == summary
    assert summary["stopped"] == "finished"
    assert summary["steps"] == 40
    assert summary["tokens"] == 40 * 2 * 16
    assert summary["train_seconds"] > 0
    assert summary["last_checkpoint"] == "step-000040"
    assert read_config(run / "config.toml") == config
    measured = [float(row["val_loss"]) for row in rows(run) if row["val_loss"]]
    assert len(measured) == 2
    assert measured[1] < measured[0] < math.log(256) + 0.1, "the loss falls"
    model = load(run)
    val = torch.tensor(list(tiny.TEXT.encode())[int(len(tiny.TEXT) * 0.9) :], dtype=torch.uint8)
    assert evaluate(model, val) == pytest.approx(summary["best_val_loss"], rel=1e-6)
    assert [line.split()[0] for line in said[:4]] == ["device", "precision", "data", "tokens"]
    assert said[-1] == f"generate     ffn generate {run}"
    assert any(str(run) in line and line.startswith("saved") for line in said)


def test_learning_rate_and_steps_are_logged(tmp_path: Path) -> None:
    config = tiny.config(
        tmp_path, "train.optimizer=adamw", "train.lr=0.1", "train.steps=10", "train.log_every=1"
    )
    train(config, quiet)
    expected = [0.05, 0.1, *(0.1 * (1 - i / 8) for i in range(8))]
    assert [float(row["lr"]) for row in rows(Path(config.out))] == pytest.approx(expected)
    assert [int(row["tokens"]) for row in rows(Path(config.out))] == [32 * step for step in range(1, 11)]


def test_equal_runs_are_equal_and_seeds_differ(tmp_path: Path) -> None:
    outcomes = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        config = tiny.config(tmp_path, f"out={tmp_path / name}", f"train.seed={seed}")
        train(config, quiet)
        outcomes.append(outcome(Path(config.out)))
    assert outcomes[0] == outcomes[1] != outcomes[2]


def test_evaluation_and_samples_do_not_change_the_training(tmp_path: Path) -> None:
    plain = tiny.config(tmp_path, f"out={tmp_path / 'a'}", "train.sample_tokens=0", "train.eval_every=12")
    chatty = tiny.config(tmp_path, f"out={tmp_path / 'b'}", "train.eval_every=1", "train.log_every=1")
    for config in (plain, chatty):
        train(config, quiet)
    assert outcome(Path(plain.out))[0] == outcome(Path(chatty.out))[0]


def test_accumulation_sees_the_same_windows(tmp_path: Path) -> None:
    losses = []
    for name, words in (("a", ["train.batch_size=4"]), ("b", ["train.accumulate=2"])):
        words += [f"out={tmp_path / name}", "model.dropout=0", "model.ffn_dropout=0"]
        config = tiny.config(tmp_path, *words)
        train(config, quiet)
        losses.append([float(row["train_loss"]) for row in rows(Path(config.out))])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_finished_run_stays_as_it_is(tmp_path: Path) -> None:
    config = tiny.config(tmp_path)
    first = train(config, quiet)
    before = outcome(Path(config.out))
    said: list[str] = []
    assert train(config, said.append) == first
    assert any(line.startswith("finished before") for line in said)
    assert not any(line.startswith("step ") for line in said)
    assert outcome(Path(config.out)) == before


def test_another_configuration_is_refused_and_names_the_keys(tmp_path: Path) -> None:
    config = tiny.config(tmp_path)
    train(config, quiet)
    before = {path: path.read_bytes() for path in Path(config.out).rglob("*") if path.is_file()}
    other = tiny.config(tmp_path, "train.lr=0.5", "model.dim=32", "data.val_fraction=0.2")
    message = r"data.val_fraction=0.2 .* 0.1, model.dim=32 .* 16, train.lr=0.5 .* 0.003; .* out="
    with pytest.raises(ValueError, match=message):
        train(other, quiet)
    assert {path: path.read_bytes() for path in Path(config.out).rglob("*") if path.is_file()} == before


def test_patience_stops_early(tmp_path: Path) -> None:
    words = [
        "train.lr=0",
        "train.muon_lr=0",
        "train.eval_every=1",
        "train.patience=3",
        "train.checkpoint_every=99",
    ]
    config = tiny.config(tmp_path, *words)
    summary = train(config, quiet)
    assert (summary["stopped"], summary["steps"], summary["best_checkpoint"]) == ("early", 4, "step-000001")
    assert train(config, quiet) == summary
    names = sorted(path.name for path in (Path(config.out) / "checkpoints").iterdir())
    assert names == ["step-000001", "step-000004"]


@pytest.mark.parametrize("what", ["loss", "gradient's norm"])
def test_a_loss_that_is_not_finite_stops_the_run(what: str, tmp_path: Path, monkeypatch) -> None:
    config = tiny.config(tmp_path)
    calls = iter(range(100))

    def broken(model, batches, precision, real=ffn.train.loop.accumulate_gradients) -> float:
        loss = real(model, batches, precision)
        if next(calls) != 9:
            return loss
        if what == "loss":
            return math.nan
        next(model.parameters()).grad.fill_(math.inf)
        return loss

    monkeypatch.setattr(ffn.train.loop, "accumulate_gradients", broken)
    run = Path(config.out)
    message = rf"step 10: the {what} is (nan|inf); .*step-000008"
    with pytest.raises(FloatingPointError, match=message):
        train(config, quiet)
    assert max(path.name for path in (run / "checkpoints").iterdir()) == "step-000008"
    monkeypatch.undo()
    assert train(config, quiet)["stopped"] == "finished"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_saves_and_resumes(number: signal.Signals, tmp_path: Path) -> None:
    whole = tiny.config(tmp_path, f"out={tmp_path / 'whole'}")
    train(whole, quiet)
    config = tiny.config(tmp_path)
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        if line.startswith("step 6/"):
            signal.raise_signal(number)

    handlers = signal.getsignal(number)
    assert train(config, say)["stopped"] == "interrupted"
    assert signal.getsignal(number) == handlers
    assert said[-1] == "resume       with the same command"
    assert (Path(config.out) / "checkpoints" / "step-000006").is_dir()
    said.clear()
    assert train(config, said.append)["stopped"] == "finished"
    assert any(line.startswith("resuming     ") and line.endswith("step-000006") for line in said)
    assert outcome(Path(config.out)) == outcome(Path(whole.out))


def test_a_second_interruption_stops_at_once(tmp_path: Path) -> None:
    def say(line: str) -> None:
        if line.startswith("step 6/"):
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            train(tiny.config(tmp_path), say)
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("allowed", [0, 6, 9, 12, 15, 18, 25])
def test_a_run_resumes_after_a_full_disk(
    allowed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After some flushes the disk is full; once there is room, the same command ends as it would have."""
    whole = tiny.config(tmp_path, f"out={tmp_path / 'whole'}")
    train(whole, quiet)
    config = tiny.config(tmp_path)
    calls = iter(range(1000))

    def fsync(descriptor: int, real=os.fsync) -> None:
        if next(calls) >= allowed:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(OSError, match="No space left on device"):
            train(config, quiet)
    train(config, quiet)
    assert outcome(Path(config.out)) == outcome(Path(whole.out))


def test_compile_compiles_the_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[torch.nn.Module] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiled.append(module))
    train(tiny.config(tmp_path, "train.steps=1", "model.num_layers=3"), quiet)
    assert compiled == []
    config = tiny.config(
        tmp_path, "train.steps=1", "model.num_layers=3", "train.compile=true", f"out={tmp_path / 'c'}"
    )
    train(config, quiet)
    assert [type(module).__name__ for module in compiled] == ["Block"] * 3


def _cannot_compile() -> str:
    """Why Inductor cannot build code for this processor, or nothing."""
    if not any(map(shutil.which, filter(None, (os.environ.get("CXX"), "g++", "clang++")))):
        return "no C++ compiler"
    header = Path(sysconfig.get_path("include")) / "Python.h"
    return "" if header.is_file() else f"no {header}"


@pytest.mark.skipif(bool(_cannot_compile()), reason=f"torch.compile: {_cannot_compile()}")
@pytest.mark.filterwarnings(r"ignore:`torch\.jit\.\w+` is deprecated:DeprecationWarning")  # torch 2.13's own
@pytest.mark.filterwarnings(r"ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo's
@pytest.mark.filterwarnings(
    r"ignore:The \.grad attribute of a Tensor that is not a leaf:UserWarning"
)  # likewise
def test_a_compiled_run_trains_evaluates_and_resumes(tmp_path: Path) -> None:
    """Inductor gives the same losses as uncompiled code; without dropout, because its draws would differ."""
    words = ["train.steps=2", "train.eval_every=1", "train.log_every=1", "train.checkpoint_every=1"]
    words += ["model.dropout=0", "model.ffn_dropout=0", "train.optimizer=adamw"]
    plain = tiny.config(tmp_path, *words, f"out={tmp_path / 'plain'}")
    train(plain, quiet)
    config = tiny.config(tmp_path, *words, "train.compile=true")
    torch._dynamo.reset()

    def interrupt(line: str) -> None:
        if line.startswith("step 1/"):
            signal.raise_signal(signal.SIGINT)

    assert train(config, interrupt)["stopped"] == "interrupted"
    assert train(config, quiet)["stopped"] == "finished"
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    torch._dynamo.reset()
    for ours, theirs in zip(rows(Path(config.out)), rows(Path(plain.out)), strict=True):
        for column in ("step", "train_loss", "val_loss", "grad_norm"):
            assert float(ours[column]) == pytest.approx(float(theirs[column]), rel=1e-4)


def a_trainer(folder: Path, *words: str) -> ffn.train.loop.Trainer:
    config = tiny.config(folder, *words)
    corpus = prepare(config.data, Path(config.out))
    return ffn.train.loop.Trainer(config, None, corpus, torch.device("cpu"), "float32", quiet)


@pytest.mark.parametrize("clip", [0.0, 0.001])
def test_the_gradient_is_clipped(clip: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = a_trainer(tmp_path, f"train.clip={clip}")
    used: list[torch.Tensor] = []
    gradients = lambda: [p.grad for p in trainer.model.parameters()]  # noqa: E731
    monkeypatch.setattr(
        trainer.optimizer, "step", lambda factor: used.append(torch.nn.utils.get_total_norm(gradients()))
    )
    _, norm = trainer._step()
    assert norm > 0.001, "the logged norm is the one before clipping"
    assert used[0].item() == pytest.approx(clip or norm, rel=1e-3)


def test_samples_are_drawn_as_configured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple] = []

    def generate(model, prompts, tokens, *, temperature, seed) -> list[list[int]]:
        given.append((tokens, temperature, seed))
        return [[65] * tokens]

    monkeypatch.setattr(ffn.train.loop, "generate", generate)
    trainer = a_trainer(tmp_path, "train.sample_tokens=3", "train.sample_temperature=0.25", "train.seed=7")
    assert trainer._sample() == "def AAA"
    assert given == [(3, 0.25, 7)]


def test_a_step_waits_for_the_device_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = a_trainer(tmp_path)
    trainer.device = torch.device("cuda:1")
    waited: list[torch.device] = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    trainer._timed_step()
    assert waited == [trainer.device]
