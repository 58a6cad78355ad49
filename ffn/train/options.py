"""`TrainingOptions`: the options that `ffn train` and `ffn classify train` share, with their checks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from math import inf
from typing import Any, Literal

from torch import nn

from ffn.files.dataclass_toml import settle
from ffn.gpt.adapters import AdapterConfig
from ffn.gpt.freeze import check_choice
from ffn.train.device import Precision
from ffn.train.optim import Schedule, ScheduledOptimizer


@dataclass(frozen=True)
class TrainingOptions:
    """Base class of the `[train]` tables: which parameters train, by which optimizer, at which rates.

    A subclass adds how long training lasts, and may change a default.

    Raises:
        ValueError: a value of another type or out of range; the message starts with the field's name.
    """

    only: str = "all"  # the part that trains: head, ffn, last:K, lora or all; see ffn.gpt.freeze
    adapter: AdapterConfig = field(default_factory=AdapterConfig)  # with only=lora
    frozen_dropout: bool = False  # True: the frozen first layers use dropout too
    batch_size: int = 32
    optimizer: Literal["adamw", "muon"] = "adamw"
    lr: float | None = None  # of AdamW: all parameters, or with muon those that are not matrices of a block
    muon_lr: float = 0.02
    betas: tuple[float, ...] = (0.9, 0.95)  # of AdamW
    momentum: float = 0.95  # of Muon
    layer_decay: float = 1.0  # multiplies a learning rate once for each block above the parameter
    weight_decay: float = 0.0  # decoupled L2 penalty on matrices, as a share of the learning rate
    l1: float = 0.0  # proximal L1 penalty on matrices, as a share of the learning rate
    schedule: Schedule = "linear"
    lr_floor: float = 0.0  # share of the learning rate at which a decaying schedule ends
    clip: float = 1.0  # largest gradient norm; 0 turns clipping off
    patience: int = 0  # evaluations without improvement before training stops; 0 never stops early
    precision: Precision = "auto"

    def __post_init__(self) -> None:
        settle(self)
        check_choice(self.only, "only")
        require(self, ["batch_size"], "1 or more", lambda x: x >= 1)
        rates = ["lr", "muon_lr", "weight_decay", "l1", "clip", "patience"]
        require(self, rates, "0 or more", lambda x: x is None or 0 <= x < inf)
        require(self, ["betas"], "two numbers in [0, 1)", lambda x: [0 <= b < 1 for b in x] == [True, True])
        require(self, ["momentum"], "a number in [0, 1)", lambda x: 0 <= x < 1)
        require(self, ["layer_decay"], "a number in (0, 1]", lambda x: 0 < x <= 1)
        require(self, ["lr_floor"], "a number in [0, 1]", lambda x: 0 <= x <= 1)

    def build_optimizer(self, model: nn.Module) -> ScheduledOptimizer:
        """Return the optimizer of the model's trainable parameters."""
        assert self.lr is not None
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


def require(config: Any, names: Iterable[str], rule: str, holds: Callable[[Any], bool]) -> None:
    """Raise ValueError, "NAME must be RULE, got VALUE", for the first field for which `holds` is false."""
    for name in names:
        value = getattr(config, name)
        if not holds(value):
            got = list(value) if isinstance(value, tuple) else value
            raise ValueError(f"{name} must be {rule}, got {got}")
