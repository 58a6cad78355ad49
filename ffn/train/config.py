"""Everything a training run is, in one configuration: `TrainConfig`, and how the folder of a run keeps it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Literal

from ffn.disk import list_checkpoints, newest_checkpoint
from ffn.files import dataclass_toml as config_file
from ffn.files.atomic import write_file
from ffn.files.dataclass_toml import flatten, from_toml, settle, to_toml
from ffn.gpt.transformer import TransformerConfig
from ffn.text.corpus import Corpus, DataConfig, open_corpus, prepare
from ffn.text.tokenizer import Tokenizer
from ffn.train.base import check_base, named_base, open_base
from ffn.train.optim import lr_factor
from ffn.train.options import TrainingOptions, require

WHERE = ("out", "device")  # say where a run takes place, and do not change what it computes


@dataclass(frozen=True)
class LoopConfig(TrainingOptions):
    """The training loop of `ffn train`. A step sees `accumulate` batches of `batch_size` windows."""

    batch_size: int = 24
    optimizer: Literal["adamw", "muon"] = "muon"
    lr: float = 3e-3
    steps: int = 400
    window: int = 0  # tokens of a training window; 0 for as many as the model reads at most
    accumulate: int = 1
    warmup: int = 20  # steps
    compile: bool = False  # compile the blocks with torch.compile
    seed: int = 1337
    eval_every: int = 100  # steps
    eval_batches: int = 16  # of the validation text, evenly spread; 0 for all of it
    checkpoint_every: int = 100  # steps; a better validation loss makes one too
    keep: int = 2  # checkpoints besides the best
    log_every: int = 10  # steps
    sample_tokens: int = 200  # of text generated at each evaluation
    sample_prompt: str = "def "
    sample_temperature: float = 0.8

    def __post_init__(self) -> None:
        super().__post_init__()
        counts = ["steps", "accumulate", "keep", "eval_every", "checkpoint_every", "log_every"]
        require(self, counts, "1 or more", lambda x: x >= 1)
        optional = ["window", "warmup", "eval_batches", "sample_tokens", "sample_temperature"]
        require(self, optional, "0 or more", lambda x: 0 <= x < inf)
        require(self, ["seed"], "a whole number of 64 bits", lambda x: -(2**63) <= x < 2**63)
        if not self.sample_prompt:
            raise ValueError("sample_prompt must have at least one character, got ''")

    def lr_factor(self, step: int) -> float:
        """Return the factor of the learning rate at step `step`, counted from 0."""
        return lr_factor(step, self.steps, self.schedule, self.warmup, self.lr_floor)


def _default_model() -> TransformerConfig:
    return TransformerConfig(
        vocab_size=256, dim=192, num_layers=4, num_heads=3, max_seq_len=192, qk_norm=True, init="zero_out"
    )


@dataclass(frozen=True)
class TrainConfig:
    """Everything a run is; the defaults train a small decoder of bytes on Python's standard library."""

    out: str = "runs/stdlib"
    device: str = "auto"
    base: str | None = None  # what `ffn.load` reads, to start from; model and data.tokenizer are then its own
    data: DataConfig = field(default_factory=DataConfig)
    model: TransformerConfig = field(default_factory=_default_model)  # its vocab_size is the tokenizer's
    train: LoopConfig = field(default_factory=LoopConfig)

    def __post_init__(self) -> None:
        settle(self)
        if not self.out:
            raise ValueError("out: wants a folder; got ''")


def read_config(file: str | Path | None, words: Iterable[str] = ()) -> TrainConfig:
    """The defaults, then a TOML file, then words such as `train.steps=100`; ValueError says what is wrong.

    With a base the defaults of model and tokenizer are the base's; the config in a run's folder says all.
    """
    words, config = list(words), TrainConfig()
    path = named_base(file, words)
    if path is not None and not (file is not None and _is_written_by_a_run(Path(file))):
        base = open_base(path)
        data = DataConfig(tokenizer=str(base.tokenizer or ""))
        config = TrainConfig(out="runs/tuned", data=data, model=base.config)
    return config_file.read_config(config, file, words)


def _resolve(config: TrainConfig, tokenizer: Tokenizer) -> TrainConfig:
    """With the tokenizer's vocabulary; ValueError where the model was given another one.

    A base may know more entries than its tokenizer has.
    """
    size = tokenizer.vocab_size
    if config.base is not None and size <= config.model.vocab_size:
        return config
    if config.model.vocab_size not in (size, _default_model().vocab_size):
        raise ValueError(
            f"model.vocab_size={config.model.vocab_size}: the tokenizer {config.data.tokenizer} has {size} "
            "entries and decides; leave model.vocab_size out"
        )
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=size))


def fingerprint(config: TrainConfig) -> str:
    """The SHA-256 of what a run computes."""
    keys = {key: value for key, value in flatten(config).items() if key not in WHERE}
    return hashlib.sha256(json.dumps(keys, sort_keys=True).encode()).hexdigest()


def open_run(config: TrainConfig, say: Callable[[str], None]) -> tuple[TrainConfig, Corpus]:
    """The resolved config, written to the run's folder, and the corpus.

    A run with checkpoints keeps the tokens it began with; if lost, they are made again from the same text.
    ValueError, and nothing is touched, where that is another by now, where no checkpoint is good, where the
    folder holds a run of another configuration or other things, and where there is no text to begin with.
    """
    if config.train.sample_tokens and not config.model.causal:
        raise ValueError(
            "train.sample_tokens: wants 0 with model.causal=false, which generates nothing; "
            f"got {config.train.sample_tokens}"
        )
    if config.train.window > config.model.max_seq_len:
        raise ValueError(
            f"train.window={config.train.window}: the model reads {config.model.max_seq_len} tokens at most"
        )
    if config.base is not None:
        check_base(open_base(config.base, say), config.model, config.data.tokenizer)
    run = Path(config.out)
    file = run / "config.toml"
    goes_on = file.exists() and bool(list_checkpoints(run))
    if goes_on:
        _refuse_other(config, file)
        corpus = _corpus_of_checkpoints(config, say)
    else:
        corpus = _first_corpus(config, file)
    config = _resolve(config, corpus.tokenizer)
    write_file(file, to_toml(config))
    for note in corpus.notes:
        say(f"data         {note}")
    sizes = f"{len(corpus.train):,} to train on, {len(corpus.val):,} to validate on"
    say(f"tokens       {sizes}, of {corpus.tokenizer.vocab_size} kinds")
    return config, corpus


def _first_corpus(config: TrainConfig, file: Path) -> Corpus:
    """Of a run without checkpoints; the config claims its folder before anything else is written there."""
    run = file.parent
    fresh = all(path.name.startswith(".") for path in run.iterdir())
    if not fresh and not _is_written_by_a_run(file):
        raise ValueError(f"out={run}: the folder holds other files; give a new one or that of a run")
    write_file(file, to_toml(config))
    try:
        return prepare(config.data, run)
    except ValueError:
        if fresh:
            file.unlink()
        raise


def _is_written_by_a_run(file: Path) -> bool:
    """Word for word: what a person wrote by hand is not to be lost, its comments neither."""
    try:
        text = file.read_text("utf-8")
        return text == to_toml(from_toml(TrainConfig, text))
    except (OSError, ValueError):
        return False


def _corpus_of_checkpoints(config: TrainConfig, say: Callable[[str], None]) -> Corpus:
    run = Path(config.out)
    corpus = open_corpus(run)
    if corpus is None:
        newest = newest_checkpoint(run, {}, say)
        if newest is None:
            raise ValueError(f"no checkpoint in {run} is good; to start anew give another folder: out=...")
        corpus = prepare(config.data, run, wanted=newest[1]["data"])
    return corpus


def _refuse_other(config: TrainConfig, file: Path) -> None:
    """ValueError with the keys that differ where the run whose config is in `file` is another one."""
    here, there = flatten(config), flatten(read_config(file))
    ignored = {*WHERE, "model.vocab_size"}  # the last follows from the others
    differing = [
        f"{key}={here[key]} where the run has {there[key]}"
        for key in here
        if key not in ignored and here[key] != there[key]
    ]
    if differing:
        raise ValueError(
            f"{file.parent} holds a run of another configuration: {', '.join(differing)}; "
            "to start a new run give another folder: out=..."
        )
