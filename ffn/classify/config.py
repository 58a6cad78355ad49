"""Everything a classifier's training is, in one configuration: `ClassifyConfig`, from TOML and key=value."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Literal

from ffn.classify.objective import METRICS, Loss
from ffn.files import dataclass_toml as config_file
from ffn.files.dataclass_toml import settle
from ffn.gpt.adapters import AdapterConfig
from ffn.gpt.freeze import check_choice
from ffn.gpt.transformer import TransformerConfig
from ffn.nn.classifier import Pooling, Transform
from ffn.train.base import named_base, open_base
from ffn.train.device import Precision
from ffn.train.optim import Schedule, ScheduledOptimizer, lr_factor


@dataclass(frozen=True)
class DataConfig:
    """What is read. A part that is not given is split off, class by class; see `ffn.classify.labelled`."""

    path: str = ""
    val: str = ""
    test: str = ""
    val_fraction: float = 0.1
    test_fraction: float = 0.1
    seed: int = 0  # of the split
    text: str = "text"  # names of columns
    label: str = "label"
    format: Literal["auto", "csv", "tsv", "jsonl", "tab"] = "auto"
    encoding: str = "utf-8"
    quotes: bool = True  # a quote that opens a cell of a table means one; false: it stands for itself
    skip_empty: bool = False  # leave rows without a text out, and say how many, rather than refuse them
    tokenizer: str = "word"  # from scratch: word, bpe, char, byte, or the path of a tokenizer.json

    def __post_init__(self) -> None:
        settle(self)
        for name in ("val_fraction", "test_fraction"):
            if not 0.0 < getattr(self, name) < 1.0:
                raise ValueError(f"{name}: wants a share between 0 and 1; got {getattr(self, name)}")


@dataclass(frozen=True)
class HeadConfig:
    """What stands on the hidden states; see `ffn.nn.classifier`."""

    pooling: Literal["auto", "first", "mean", "last"] = "auto"  # the last token of a decoder, else the mean
    transform: Transform | None = None
    dropout: float = 0.1

    def __post_init__(self) -> None:
        settle(self)

    def chosen(self, causal: bool) -> Pooling:
        """The pooling, once it is known whether the backbone is a decoder."""
        return ("last" if causal else "mean") if self.pooling == "auto" else self.pooling


@dataclass(frozen=True)
class FitConfig:
    """How to train. Rates left out follow from what trains; `chosen_lr` has them."""

    epochs: int = 10
    batch_size: int = 32
    optimizer: Literal["adamw", "muon"] = "adamw"
    lr: float | None = None
    muon_lr: float = 0.02
    layer_decay: float = 1.0  # a rate is multiplied by it for each block above
    betas: tuple[float, ...] = (0.9, 0.98)
    weight_decay: float = 0.01  # decoupled L2 penalty on matrices, a share of the learning rate
    l1: float = 0.0  # proximal L1 penalty on matrices, likewise
    schedule: Schedule = "linear"
    warmup: float = 0.1  # share of all steps
    clip: float = 1.0  # the largest gradient norm; 0 for any
    loss: Loss = "cross_entropy"
    class_weights: str = "none"  # "balanced", or as in "neg:1, pos:2.5"
    label_smoothing: float = 0.0
    word_dropout: float = 0.0  # probability that a token of a training text is left out
    metric: str = "auto"  # decides what was best: accuracy, or mse for numbers
    patience: int = 3  # epochs without a better one before stopping; 0 to go on
    seeds: tuple[int, ...] = (1337,)  # more than one train as many models, whose predictions are averaged
    precision: Precision = "auto"
    frozen_dropout: bool = False  # let the frozen first layers drop values too
    cache: bool = True  # run what stays frozen once, where only the head trains

    def __post_init__(self) -> None:
        settle(self)
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: wants 1 or more; got {getattr(self, name)}")
        for name in ("lr", "muon_lr", "weight_decay", "l1", "clip", "patience"):
            if not (getattr(self, name) is None or inf > getattr(self, name) >= 0):
                raise ValueError(f"{name}: wants 0 or more; got {getattr(self, name)}")
        for name in ("label_smoothing", "word_dropout", "warmup"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name}: wants a share in [0, 1); got {getattr(self, name)}")
        if not 0.0 < self.layer_decay <= 1.0:
            raise ValueError(f"layer_decay: wants a share in (0, 1]; got {self.layer_decay}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: wants two numbers in [0, 1); got {list(self.betas)}")
        if not self.seeds or len({*self.seeds}) < len(self.seeds):
            raise ValueError(f"seeds: wants one or more, each another; got {list(self.seeds)}")
        if not all(-(2**63) <= seed < 2**63 for seed in self.seeds):
            raise ValueError(f"seeds: wants whole numbers of 64 bits; got {list(self.seeds)}")
        if self.loss == "mse":
            for name, nothing in (("class_weights", "none"), ("label_smoothing", 0.0)):
                if getattr(self, name) != nothing:
                    raise ValueError(f"{name}: numbers have no classes; wants {nothing} with loss=mse")
        known = METRICS[self.loss]
        if self.metric not in ("auto", *known):
            raise ValueError(f"metric: wants auto or one of {', '.join(known)}; got {self.metric!r}")

    @property
    def chosen_metric(self) -> str:
        """The metric that decides."""
        return METRICS[self.loss][1] if self.metric == "auto" else self.metric

    def lr_factor(self, step: int, steps: int) -> float:
        """The share of the learning rate that step `step` of `steps`, counted from 0, takes."""
        return lr_factor(step, steps, self.schedule, round(self.warmup * steps))

    def build_optimizer(self, model, lr: float) -> ScheduledOptimizer:
        """The optimizer of what trains."""
        return ScheduledOptimizer(
            model,
            self.optimizer,
            lr=lr,
            muon_lr=self.muon_lr,
            weight_decay=self.weight_decay,
            l1=self.l1,
            betas=(self.betas[0], self.betas[1]),
            layer_decay=self.layer_decay,
        )


def _default_model() -> TransformerConfig:
    """BERT's form, which on small data came out ahead of rotary positions with norms before."""
    return TransformerConfig(
        vocab_size=10_000,
        dim=128,
        num_layers=2,
        num_heads=4,
        hidden_dim=512,
        max_seq_len=100,
        activation="gelu",
        bias=True,
        attention_bias=True,
        position="learned",
        norm="layernorm",
        norm_position="post",
        causal=False,
        embedding_norm=True,
        num_token_types=1,
        head="none",
        dropout=0.1,
    )


@dataclass(frozen=True)
class ClassifyConfig:
    """Everything a training is. Without `base` the model is built from `model`, and its tokenizer made; with
    one `model` and `data.tokenizer` are its own, and the dropouts of `model` may be others.

    `train` says what trains of a pretrained model; see `ffn.gpt.freeze`. Adapters are merged at the end.
    """

    out: str = "runs/classify"
    device: str = "auto"
    base: str | None = None  # what --from names: a folder that `ffn.load` reads
    train: str = "all"
    data: DataConfig = field(default_factory=DataConfig)
    model: TransformerConfig = field(default_factory=_default_model)  # vocab_size: of the tokenizer, at most
    head: HeadConfig = field(default_factory=HeadConfig)
    fit: FitConfig = field(default_factory=FitConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)  # with train=lora

    def __post_init__(self) -> None:
        settle(self)
        check_choice(self.train)

    @property
    def chosen_lr(self) -> float:
        """fit.lr, or the usual one for what trains."""
        if self.fit.lr is not None:
            return self.fit.lr
        if not self.base:
            return 1e-3
        return {"head": 5e-3, "lora": 1e-3}.get(self.train, 1e-4)


def read_config(file: str | Path | None = None, words: Iterable[str] = ()) -> ClassifyConfig:
    """The defaults, then a TOML file, then words such as `fit.epochs=3`; ValueError says what is wrong.

    With a base the defaults of model and tokenizer are the base's.
    """
    words, config = list(words), ClassifyConfig()
    if (path := named_base(file, words)) is not None:
        base = open_base(path)
        data = DataConfig(tokenizer=str(base.tokenizer or ""))
        config = ClassifyConfig(model=dataclasses.replace(base.config, head="none"), data=data)
    return config_file.read_config(config, file, words)


def read_data_config(folder: str | Path, words: Iterable[str] = ()) -> DataConfig:
    """How a classifier's texts were read, as far as its config.toml is there to tell, then words such as
    `data.label=stars`; its base may be gone."""
    words, file = list(words), Path(folder) / "config.toml"
    found = config_file.read_config(ClassifyConfig(), file if file.exists() else None, words)
    if other := [word for word in words if not word.startswith("data.")]:
        raise ValueError(f"{other[0]}: nothing is trained here; wants keys of data, such as data.label=stars")
    return found.data
