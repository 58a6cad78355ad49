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

from ffn.files import dataclass_toml as config_file
from ffn.files.atomic import write_file
from ffn.files.checkpoints import list_checkpoints, newest_checkpoint
from ffn.files.dataclass_toml import flatten, from_toml, settle, to_toml
from ffn.gpt.adapters import AdapterConfig
from ffn.gpt.freeze import check_choice
from ffn.gpt.transformer import Transformer, TransformerConfig
from ffn.text.corpus import Corpus, DataConfig, open_corpus, prepare
from ffn.text.tokenizer import Tokenizer
from ffn.train.base import check_base, named_base, open_base
from ffn.train.device import Precision
from ffn.train.optim import Schedule, ScheduledOptimizer, lr_factor

WHERE = ("out", "device")  # say where a run takes place, and do not change what it computes


@dataclass(frozen=True)
class LoopConfig:
    """How to train. A step sees `accumulate` batches of `batch_size` windows."""

    steps: int = 400
    batch_size: int = 24
    window: int = 0  # tokens of a training window; 0 for as many as the model reads at most
    accumulate: int = 1
    only: str = "all"  # what trains: head, ffn, last:K, lora or all; see ffn.gpt.freeze
    adapter: AdapterConfig = field(default_factory=AdapterConfig)  # with only=lora
    frozen_dropout: bool = False  # whether what is frozen before the first part that trains drops values
    optimizer: Literal["adamw", "muon"] = "muon"
    lr: float = 3e-3  # of AdamW: everything, or with muon what is not a matrix of a block
    muon_lr: float = 0.02
    betas: tuple[float, ...] = (0.9, 0.95)
    momentum: float = 0.95  # of Muon
    layer_decay: float = 1.0  # of a learning rate, for each block between a weight and the output
    weight_decay: float = 0.0  # decoupled L2 penalty on matrices, a share of the learning rate
    l1: float = 0.0  # proximal L1 penalty on matrices, likewise
    schedule: Schedule = "linear"
    warmup: int = 20  # steps
    lr_floor: float = 0.0  # where a decaying schedule ends, as a share of the learning rate
    clip: float = 1.0  # the largest gradient norm; 0 for any
    precision: Precision = "auto"
    compile: bool = False  # the blocks, through torch.compile
    seed: int = 1337
    eval_every: int = 100  # steps
    eval_batches: int = 16  # of the validation text, evenly spread; 0 for all of it
    patience: int = 0  # evaluations without a better validation loss before stopping; 0 to go on
    checkpoint_every: int = 100  # steps; a better validation loss makes one too
    keep: int = 2  # checkpoints besides the best
    log_every: int = 10  # steps
    sample_tokens: int = 200  # of text generated at each evaluation
    sample_prompt: str = "def "
    sample_temperature: float = 0.8

    def __post_init__(self) -> None:
        settle(self)
        counts = ("steps", "batch_size", "accumulate", "keep", "eval_every", "checkpoint_every", "log_every")
        rates = ("lr", "muon_lr", "weight_decay", "l1", "clip", "sample_temperature")
        try:
            check_choice(self.only)
        except ValueError as error:
            raise ValueError(f"only: {error}") from None
        for name in (*counts, *rates, "window", "warmup", "patience", "eval_batches", "sample_tokens"):
            least = 1 if name in counts else 0
            if not inf > getattr(self, name) >= least:
                raise ValueError(f"{name}: wants {least} or more; got {getattr(self, name)}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: wants two numbers in [0, 1); got {list(self.betas)}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum: wants a number in [0, 1); got {self.momentum}")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay: wants a number above 0, 1 at most; got {self.layer_decay}")
        if not 0 <= self.lr_floor <= 1:
            raise ValueError(f"lr_floor: wants a number in [0, 1]; got {self.lr_floor}")
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed: wants a whole number of 64 bits; got {self.seed}")
        if not self.sample_prompt:
            raise ValueError("sample_prompt: wants at least one character")

    def lr_factor(self, step: int) -> float:
        """The share of the learning rate that step `step`, counted from 0, takes."""
        return lr_factor(step, self.steps, self.schedule, self.warmup, self.lr_floor)

    def build_optimizer(self, model: Transformer) -> ScheduledOptimizer:
        """The optimizer of the model's parameters."""
        return ScheduledOptimizer(
            model,
            self.optimizer,
            lr=self.lr,
            muon_lr=self.muon_lr,
            weight_decay=self.weight_decay,
            l1=self.l1,
            betas=(self.betas[0], self.betas[1]),
            momentum=self.momentum,
            layer_decay=self.layer_decay,
        )


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
