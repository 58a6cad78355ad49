"""Defaults that depend on other keys, and one line for each wrong key."""

import dataclasses
from pathlib import Path

import pytest
import torch

from ffn.classify.config import ClassifyConfig, FitConfig, HeadConfig, read_config
from ffn.files.dataclass_toml import from_toml, to_toml
from ffn.nn.classifier import Classifier
from tests.conftest import ROOT
from tests.models import build


def test_a_config_is_written_and_read_back() -> None:
    config = read_config(None, ["train.seeds=[1,2]", "head.transform=tanh", "train.lr=0.5"])
    config = dataclasses.replace(config, base="x")
    assert config.train.seeds == (1, 2)
    assert from_toml(ClassifyConfig, to_toml(config)) == config
    assert from_toml(ClassifyConfig, to_toml(ClassifyConfig())) == ClassifyConfig()


def test_the_shipped_configs_are_read() -> None:
    config = read_config(ROOT / "configs" / "classify.toml").model
    sizes = (config.num_layers, config.dim, config.hidden_width, config.max_seq_len, config.vocab_size)
    assert sizes == (2, 128, 512, 100, 10_000)
    assert not config.causal
    assert read_config(ROOT / "configs" / "titles.toml") != ClassifyConfig()


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("train.epochs=0", "^train.epochs must be 1 or more, got 0$"),
        ("train.lr=-1", "^train.lr must be 0 or more"),
        ("train.muon_lr=inf", "^train.muon_lr must be 0 or more"),
        ("train.word_dropout=1.0", "^train.word_dropout must be"),
        ("train.layer_decay=0.0", "^train.layer_decay must be"),
        ("train.betas=[0.9]", "^train.betas must be"),
        ("train.seeds=[1, 1]", "^train.seeds must be"),
        ("train.seeds=[]", "^train.seeds must be"),
        ("train.seeds=[9223372036854775808]", "^train.seeds must be"),
        ("train.metric=f1", "^train.metric must be one of auto, loss, accuracy, precision_macro, "),
        ("train.loss=hinge", "^train.loss.*cross_entropy, binary_cross_entropy, mse"),
        ("train.only=some", "^train.only must be head, ffn, last:K, lora or all, got some$"),
        ("train=head", "^train"),
        ("data.val_fraction=1.0", "^data.val_fraction must be"),
        ("head.pool=mean", r"^head.pool.*head.pooling"),
        ("epochs=3", r"^epochs.*train.epochs"),
        ("adapter.rank=4", r"^adapter is not a key; did you mean train.adapter.rank\?$"),
    ],
)
def test_wrong_values_raise(word: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_config(None, [word])


@pytest.mark.parametrize("word", ["class_weights=balanced", "label_smoothing=0.1"])
def test_regression_has_no_class_options(word: str) -> None:
    with pytest.raises(ValueError, match=rf"^train.{word.partition('=')[0]} must be"):
        read_config(None, ["train.loss=mse", f"train.{word}"])


def test_an_error_names_the_config_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"x.toml: "):
        read_config(tmp_path / "x.toml")
    (tmp_path / "y.toml").write_text("[train]\nepochs = 'many'\n")
    with pytest.raises(ValueError, match=r"y.toml: train.epochs"):
        read_config(tmp_path / "y.toml")


def test_defaults_depend_on_other_keys() -> None:
    assert HeadConfig().chosen(causal=True) == "last"
    assert HeadConfig().chosen(causal=False) == "mean"
    assert HeadConfig("first").chosen(causal=False) == "first"
    settings = ({}, {"base": "x"}, {"base": "x", "train": FitConfig(only="head")})
    lrs = [ClassifyConfig(**words).chosen_lr for words in settings]  # type: ignore[arg-type]
    assert lrs[0] > lrs[1] < lrs[2]
    assert read_config(None, ["train.lr=0.25"]).chosen_lr == 0.25
    assert read_config(None, ["train.loss=mse"]).train.chosen_metric == "mse"
    assert read_config(None, ["train.metric=f1_macro"]).train.chosen_metric == "f1_macro"


def test_layer_decay_and_warmup_scale_the_learning_rate() -> None:
    fit = read_config(None, ["train.layer_decay=0.5", "train.warmup=0.1", "train.lr=1.0"]).train
    model = Classifier(build(torch.float32, causal=False, head="none"), 2)
    optimizer = fit.build_optimizer(model)
    rates = {id(p): group["lr"] for group in optimizer._groups() for p in group["params"]}
    assert rates[id(model.head.out_proj.weight)] == 1.0
    assert rates[id(model.backbone.blocks[1].attention.q_proj.weight)] == 1.0  # type: ignore[attr-defined]
    assert rates[id(model.backbone.blocks[0].attention.q_proj.weight)] == 0.5  # type: ignore[attr-defined]
    assert rates[id(model.backbone.embedding.weight)] == 0.25  # type: ignore[attr-defined]
    assert [fit.lr_factor(step, 20) for step in (0, 1, 2, 11)] == [0.5, 1.0, 1.0, 0.5]
