"""Every option reaches training: it changes the trained weights."""

import dataclasses
from pathlib import Path

import pytest
import torch

from ffn.classify import load_classifier, train
from tests.classify.samples import PRETRAINED, config, quiet, texts, write_base, write_table

SCRATCH = [
    "train.lr=1e-3", "train.batch_size=16", "train.schedule=constant", "train.warmup=0.5",
    "train.betas=[0.5, 0.9]", "train.clip=1e-3", "train.lr_floor=0.5", "train.weight_decay=0.5",
    "train.l1=0.1", "train.layer_decay=0.5", "train.optimizer=muon", "train.label_smoothing=0.3",
    "train.class_weights=balanced", "train.class_weights=food:3, music:1, sea:1", "train.word_dropout=0.3",
    "train.seeds=[7]", "train.precision=bfloat16", "head.dropout=0.5", "head.transform=relu",
    "head.pooling=last", "model.dropout=0.3", "data.seed=7", "data.val_fraction=0.3",
    "data.test_fraction=0.3", "data.tokenizer=byte",
]  # fmt: skip
TUNED = [
    "train.frozen_dropout=true", "model.dropout=0.1", "train.only=lora", "train.muon_lr=0.1",
    "train.momentum=0.5",
]  # fmt: skip
ADAPTED = [
    "train.adapter.rank=2", "train.adapter.alpha=4", "train.adapter.dropout=0.3",
    'train.adapter.targets=["attention"]',
]  # fmt: skip


def weights(folder: Path, *words: str) -> dict[str, torch.Tensor]:
    """Return the weights after one epoch of training."""
    if not (folder / "texts.csv").exists():
        many = [(text, name) for i, (text, name) in enumerate(texts(90)) if name != "sea" or i % 2]
        write_table(folder / "texts.csv", many)
    out = folder / str(len([*folder.iterdir()]))
    train(config(folder, "train.epochs=1", f"out={out}", *words), quiet)
    return load_classifier(out).members[0].state_dict()


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ffn.classify.training.draw", lambda *_: True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("wiring")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    shape = dataclasses.replace(PRETRAINED, dropout=0.3)
    return f"base={write_base(tmp_path_factory.mktemp('base'), shape)}"


@pytest.fixture(scope="module")
def scratch(folder: Path) -> dict[str, torch.Tensor]:
    return weights(folder)


@pytest.fixture(scope="module")
def tuned(folder: Path, base: str) -> dict[str, torch.Tensor]:
    return weights(folder, base, "train.only=last:1", "train.optimizer=muon")


@pytest.fixture(scope="module")
def adapted(folder: Path, base: str) -> dict[str, torch.Tensor]:
    return weights(folder, base, "train.only=lora")


def test_equal_options_give_equal_weights(folder: Path, base: str, scratch, tuned, adapted) -> None:
    assert same(weights(folder), scratch)
    assert same(weights(folder, base, "train.only=last:1", "train.optimizer=muon"), tuned)
    assert same(weights(folder, base, "train.only=lora"), adapted)


@pytest.mark.parametrize("word", SCRATCH)
def test_options_without_a_base_change_the_weights(word: str, folder: Path, scratch) -> None:
    assert not same(weights(folder, word), scratch)


@pytest.mark.parametrize("word", TUNED)
def test_options_with_a_base_change_the_weights(word: str, folder: Path, base: str, tuned) -> None:
    assert not same(weights(folder, base, "train.only=last:1", "train.optimizer=muon", word), tuned)


@pytest.mark.parametrize("word", ADAPTED)
def test_options_of_adapters_change_the_weights(word: str, folder: Path, base: str, adapted) -> None:
    assert not same(weights(folder, base, "train.only=lora", word), adapted)


def test_the_seed_draws_the_initial_weights(folder: Path) -> None:
    """With a learning rate of 0 the order of the texts has no effect."""
    assert not same(
        weights(folder, "train.lr=0", "train.seeds=[7]"), weights(folder, "train.lr=0", "train.seeds=[8]")
    )


@pytest.mark.parametrize("what", ["all", "last:1", "lora"])
def test_each_member_of_an_ensemble_starts_from_the_base(what: str, folder: Path, base: str) -> None:
    words = [base, f"train.only={what}"]
    alone = [weights(folder, *words, f"train.seeds=[{seed}]") for seed in (1, 2)]
    out = folder / f"ensemble-{what[:4]}"
    train(config(folder, *words, "train.seeds=[1, 2]", "train.epochs=1", f"out={out}"), quiet)
    members = load_classifier(out).members
    assert all(same(member.state_dict(), one) for member, one in zip(members, alone, strict=True))
