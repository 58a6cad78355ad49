"""The configuration of a training run: `TrainConfig`."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from math import inf
from typing import Literal

from ffn.files.dataclass_toml import flatten, settle
from ffn.gpt.transformer import TransformerConfig
from ffn.text.corpus import DataConfig
from ffn.train.optim import lr_factor
from ffn.train.options import TrainingOptions, require

WHERE = ("out", "device")  # keys that do not change what a run computes


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
    """The configuration of a run; the defaults train a small decoder on Python's standard library."""

    out: str = "runs/stdlib"
    device: str = "auto"
    base: str | None = None  # a path that `ffn.load` reads, to start from; it decides model and tokenizer
    data: DataConfig = field(default_factory=DataConfig)
    model: TransformerConfig = field(default_factory=_default_model)  # vocab_size is the tokenizer's
    train: LoopConfig = field(default_factory=LoopConfig)

    def __post_init__(self) -> None:
        settle(self)
        if not self.out:
            raise ValueError("out must be a folder, got ''")


def fingerprint(config: TrainConfig) -> str:
    """Return the SHA-256 of all keys that change what a run computes."""
    keys = {key: value for key, value in flatten(config).items() if key not in WHERE}
    return hashlib.sha256(json.dumps(keys, sort_keys=True).encode()).hexdigest()
