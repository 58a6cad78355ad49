"""`ClassifyConfig`: the configuration of `ffn classify train`, from TOML files and key=value words."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ffn.classify.objective import METRICS, Loss
from ffn.files import dataclass_toml as config_file
from ffn.files.dataclass_toml import settle
from ffn.gpt.transformer import TransformerConfig
from ffn.nn.classifier import Pooling, Transform
from ffn.train.base import Base, named_base, open_base
from ffn.train.optim import lr_factor
from ffn.train.options import TrainingOptions, require


@dataclass(frozen=True)
class DataConfig:
    """Paths of the labelled texts and how to read them.

    A split without a path of its own is drawn from `path`, class by class.
    """

    path: str = ""
    val: str = ""
    test: str = ""
    val_fraction: float = 0.1
    test_fraction: float = 0.1
    seed: int = 0  # of the split
    text: str = "text"  # name of a column or key
    label: str = "label"  # name of a column or key
    format: Literal["auto", "csv", "tsv", "jsonl", "tab"] = "auto"
    encoding: str = "utf-8"
    quotes: bool = True  # read quotes around a cell of a table as quoting; false: as text
    skip_empty: bool = False  # skip rows without text; false: raise an error
    tokenizer: str = "word"  # word, bpe, char, byte, or the path of a tokenizer.json

    def __post_init__(self) -> None:
        settle(self)
        require(self, ["val_fraction", "test_fraction"], "a number in (0, 1)", lambda x: 0 < x < 1)


@dataclass(frozen=True)
class HeadConfig:
    """The head on the hidden states; see `ffn.nn.classifier`."""

    pooling: Literal["auto", "first", "mean", "last"] = "auto"  # auto: last for a decoder, else mean
    transform: Transform | None = None
    dropout: float = 0.1

    def __post_init__(self) -> None:
        settle(self)

    def chosen(self, causal: bool) -> Pooling:
        """Return the pooling for a decoder (causal) or an encoder."""
        return ("last" if causal else "mean") if self.pooling == "auto" else self.pooling


@dataclass(frozen=True)
class FitConfig(TrainingOptions):
    """The training loop of a classifier. Without `lr`, `ClassifyConfig.chosen_lr` applies."""

    betas: tuple[float, ...] = (0.9, 0.98)
    weight_decay: float = 0.01
    patience: int = 3  # epochs without improvement before training stops; 0 never stops early
    epochs: int = 10
    warmup: float = 0.1  # share of all steps
    loss: Loss = "cross_entropy"
    class_weights: str = "none"  # "balanced", or as in "neg:1, pos:2.5"
    label_smoothing: float = 0.0
    word_dropout: float = 0.0  # probability that a token of a training text is left out
    metric: str = "auto"  # decides which epoch is best: accuracy, or mse for numbers
    seeds: tuple[int, ...] = (1337,)  # one model is trained for each; their predictions are averaged
    cache: bool = True  # with only=head: run the frozen backbone once and keep its features

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, ["epochs"], "1 or more", lambda x: x >= 1)
        shares = ["label_smoothing", "word_dropout", "warmup"]
        require(self, shares, "a number in [0, 1)", lambda x: 0 <= x < 1)
        require(self, ["seeds"], "different numbers, one or more", lambda x: len({*x}) == len(x) > 0)
        require(self, ["seeds"], "whole numbers of 64 bits", lambda x: all(-(2**63) <= s < 2**63 for s in x))
        if self.loss == "mse":
            for name, nothing in (("class_weights", "none"), ("label_smoothing", 0.0)):
                if getattr(self, name) != nothing:
                    raise ValueError(f"{name} must be {nothing} with loss=mse, got {getattr(self, name)}")
        known = ("auto", *METRICS[self.loss])
        require(self, ["metric"], f"one of {', '.join(known)}", lambda x: x in known)

    @property
    def chosen_metric(self) -> str:
        """The metric that decides which epoch is best."""
        return METRICS[self.loss][1] if self.metric == "auto" else self.metric

    def lr_factor(self, step: int, steps: int) -> float:
        """Return the factor of the learning rate at step `step` of `steps`, counted from 0."""
        return lr_factor(step, steps, self.schedule, round(self.warmup * steps), self.lr_floor)


def _default_model() -> TransformerConfig:
    """BERT's architecture; on small data it beat rotary positions with pre-norm."""
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
    """The whole configuration of `ffn classify train`.

    Without `base` the model is built from `model` and a tokenizer is trained on the texts. With `base`,
    `model` and `data.tokenizer` are those of the base; only the dropouts of `model` may differ. Adapters
    (train.only=lora) are merged at the end.
    """

    out: str = "runs/classify"
    device: str = "auto"
    base: str | None = None  # the argument of --from: a path that `ffn.load` reads
    data: DataConfig = field(default_factory=DataConfig)
    model: TransformerConfig = field(default_factory=_default_model)  # vocab_size: upper limit
    head: HeadConfig = field(default_factory=HeadConfig)
    train: FitConfig = field(default_factory=FitConfig)

    def __post_init__(self) -> None:
        settle(self)

    @property
    def chosen_lr(self) -> float:
        """train.lr, or the default for the parameters that train."""
        if self.train.lr is not None:
            return self.train.lr
        if not self.base:
            return 1e-3
        return {"head": 5e-3, "lora": 1e-3}.get(self.train.only, 1e-4)


def read_config(file: str | Path | None = None, words: Iterable[str] = ()) -> ClassifyConfig:
    """Return the configuration: defaults, then a TOML file, then words such as `train.epochs=3`.

    With a base, the defaults of `model` and `data.tokenizer` are those of the base.

    Raises:
        ValueError: an unknown key, a wrong value, or a base that cannot be read.
    """
    return read_config_and_base(file, words)[0]


def read_config_and_base(
    file: str | Path | None = None, words: Iterable[str] = ()
) -> tuple[ClassifyConfig, Base | None]:
    """Return the configuration and its opened base; pass both to `train`, as opening a base hashes it."""
    words, config, base = list(words), ClassifyConfig(), None
    if (path := named_base(file, words)) is not None:
        base = open_base(path)
        data = DataConfig(tokenizer=str(base.tokenizer or ""))
        config = ClassifyConfig(model=dataclasses.replace(base.config, head="none"), data=data)
    return config_file.read_config(config, file, words), base


def read_data_config(folder: str | Path, words: Iterable[str] = ()) -> DataConfig:
    """Return the DataConfig of a classifier: its config.toml, if any, then words such as `data.label=stars`.

    Its base need not exist.
    """
    words, file = list(words), Path(folder) / "config.toml"
    found = config_file.read_config(ClassifyConfig(), file if file.exists() else None, words)
    if other := [word for word in words if not word.startswith("data.")]:
        raise ValueError(f"{other[0]}: give only keys such as data.label=stars, as nothing is trained")
    return found.data
