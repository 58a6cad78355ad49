"""The configuration: what follows from what is left out, and one line for each key that is wrong."""

import dataclasses
from pathlib import Path

import pytest
import torch

from ffn.classify.recipe import ClassifyConfig, HeadConfig, read_config
from ffn.files.dataclass_toml import from_toml, to_toml
from ffn.nn.classifier import Classifier
from tests.conftest import ROOT
from tests.models import build


def test_it_is_written_and_read_back() -> None:
    config = read_config(None, ["fit.seeds=[1,2]", "head.transform=tanh", "fit.lr=0.5"])
    config = dataclasses.replace(config, base="x")
    assert config.fit.seeds == (1, 2)
    assert from_toml(ClassifyConfig, to_toml(config)) == config
    assert from_toml(ClassifyConfig, to_toml(ClassifyConfig())) == ClassifyConfig()


def test_the_configs_that_come_with_it_are_read() -> None:
    config = read_config(ROOT / "configs" / "classify.toml").model
    sizes = (config.num_layers, config.dim, config.hidden_width, config.max_seq_len, config.vocab_size)
    assert sizes == (2, 128, 512, 100, 10_000)
    assert not config.causal
    assert read_config(ROOT / "configs" / "titles.toml") != ClassifyConfig()


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("fit.epochs=0", r"^fit.epochs: wants 1 or more; got 0$"),
        ("fit.lr=-1", r"^fit.lr: wants 0 or more; got -1.0$"),
        ("fit.muon_lr=inf", r"^fit.muon_lr: wants 0 or more; got inf$"),
        ("fit.word_dropout=1.0", r"^fit.word_dropout: wants a share in \[0, 1\); got 1.0$"),
        ("fit.layer_decay=0.0", r"^fit.layer_decay: wants a share in \(0, 1\]; got 0.0$"),
        ("fit.betas=[0.9]", r"^fit.betas: wants two numbers"),
        ("fit.seeds=[1, 1]", r"^fit.seeds: wants one or more, each another; got \[1, 1\]$"),
        ("fit.seeds=[]", r"^fit.seeds: wants one or more"),
        ("fit.seeds=[9223372036854775808]", r"^fit.seeds: wants whole numbers of 64 bits; got \[92"),
        ("fit.metric=f1", r"^fit.metric: wants auto or one of loss, accuracy, precision_macro, "),
        ("fit.loss=hinge", r"^fit.loss must be one of .* got 'hinge'"),
        ("data.val_fraction=1.0", r"^data.val_fraction: wants a share between 0 and 1; got 1.0$"),
        ("head.pool=mean", r"^head.pool is not a key; .* head.pooling\?$"),
        ("epochs=3", r"^epochs is not a key; .* fit.epochs\?$"),
    ],
)
def test_wrong_keys(word: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_config(None, [word])


@pytest.mark.parametrize("word", ["class_weights=balanced", "label_smoothing=0.1"])
def test_numbers_have_no_classes(word: str) -> None:
    with pytest.raises(ValueError, match=rf"^fit.{word.partition('=')[0]}: numbers have no classes; wants"):
        read_config(None, ["fit.loss=mse", f"fit.{word}"])


def test_a_file_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"x.toml: cannot read this config"):
        read_config(tmp_path / "x.toml")
    (tmp_path / "y.toml").write_text("[fit]\nepochs = 'many'\n")
    with pytest.raises(ValueError, match=r"y.toml: fit.epochs must be an integer, got 'many'$"):
        read_config(tmp_path / "y.toml")


def test_what_is_left_out_follows() -> None:
    assert HeadConfig().chosen(causal=True) == "last"
    assert HeadConfig().chosen(causal=False) == "mean"
    assert HeadConfig("first").chosen(causal=False) == "first"
    settings = ({}, {"base": "x"}, {"base": "x", "train": "head"})
    lrs = [ClassifyConfig(**words).chosen_lr for words in settings]  # type: ignore[arg-type]
    assert lrs[0] > lrs[1] < lrs[2]
    assert read_config(None, ["fit.lr=0.25"]).chosen_lr == 0.25
    assert read_config(None, ["fit.loss=mse"]).fit.chosen_metric == "mse"
    assert read_config(None, ["fit.metric=f1_macro"]).fit.chosen_metric == "f1_macro"


def test_rates_fall_with_depth_and_rise_at_first() -> None:
    fit = read_config(None, ["fit.layer_decay=0.5", "fit.warmup=0.1"]).fit
    model = Classifier(build(torch.float32, causal=False, head="none"), 2)
    optimizer = fit.build_optimizer(model, 1.0)
    rates = {id(p): group["lr"] for group in optimizer._groups() for p in group["params"]}
    assert rates[id(model.head.out_proj.weight)] == 1.0
    assert rates[id(model.backbone.blocks[1].attention.q_proj.weight)] == 1.0  # type: ignore[attr-defined]
    assert rates[id(model.backbone.blocks[0].attention.q_proj.weight)] == 0.5  # type: ignore[attr-defined]
    assert rates[id(model.backbone.embedding.weight)] == 0.25  # type: ignore[attr-defined]
    assert [fit.lr_factor(step, 20) for step in (0, 1, 2, 11)] == [0.5, 1.0, 1.0, 0.5]
