"""The configuration of a training run: `TrainConfig`."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from math import inf
from typing import Literal

from ffn.files.dataclass_toml import flatten, settle
from ffn.gpt.adapters import AdapterConfig
from ffn.gpt.freeze import check_choice
from ffn.gpt.transformer import Transformer, TransformerConfig
from ffn.text.corpus import DataConfig
from ffn.train.device import Precision
from ffn.train.optim import Schedule, ScheduledOptimizer, lr_factor

WHERE = ("out", "device")  # keys that do not change what a run computes


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
