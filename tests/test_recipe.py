"""The configuration of a run: defaults, files, words, and the folder that keeps it."""

import dataclasses
from pathlib import Path

import pytest

from ffn.recipe import LoopConfig, TrainConfig, fingerprint, open_run, read_config
from tests import tiny
from tests.conftest import ROOT


def test_defaults_then_file_then_words(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("[train]\nsteps = 7\nlr = 0.5\n[model]\ndim = 96\n")
    config = read_config(tmp_path / "c.toml", ["train.lr=0.25"])
    assert config.train == dataclasses.replace(LoopConfig(), steps=7, lr=0.25)
    assert config.model == dataclasses.replace(TrainConfig().model, dim=96)
    assert read_config(None) == TrainConfig()


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.toml")), ids=lambda file: file.stem)
def test_the_shipped_files_are_read(file: Path) -> None:
    assert read_config(file) != TrainConfig()


def test_a_wrong_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("[train]\nlr_rate = 0.5\n")
    with pytest.raises(ValueError, match=r"c\.toml: train\.lr_rate: no such key; did you mean train\.lr\?"):
        read_config(tmp_path / "c.toml")
    with pytest.raises(ValueError, match=r"absent\.toml: cannot read this config: No such file"):
        read_config(tmp_path / "absent.toml")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "train.steps: wants 1 or more; got 0"),
        ({"lr": -1.0}, "train.lr: wants 0 or more; got -1.0"),
        ({"l1": float("nan")}, "train.l1: wants 0 or more; got nan"),
        ({"betas": (0.9,)}, r"train.betas: wants two numbers in \[0, 1\); got \[0.9\]"),
    ],
)
def test_values_out_of_range_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoopConfig(**change)


def test_the_fingerprint_is_of_what_is_computed() -> None:
    config = TrainConfig()
    elsewhere = dataclasses.replace(config, out="x", device="cpu")
    assert fingerprint(elsewhere) == fingerprint(config)
    other = dataclasses.replace(config, train=LoopConfig(seed=1))
    assert fingerprint(other) != fingerprint(config)


def test_the_tokenizer_decides_the_vocabulary(tmp_path: Path) -> None:
    config = tiny.config(tmp_path, "data.tokenizer=char")
    Path(config.out).mkdir()
    resolved, corpus = open_run(config, lambda _: None)
    assert resolved.model.vocab_size == corpus.tokenizer.vocab_size == len(set(tiny.TEXT))
    assert read_config(Path(config.out) / "config.toml") == resolved
    wrong = tiny.config(tmp_path, "data.tokenizer=char", "model.vocab_size=99")
    with pytest.raises(
        ValueError, match=r"model\.vocab_size=99: the tokenizer char has \d+ entries and decides"
    ):
        open_run(wrong, lambda _: None)


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path) -> None:
    config = tiny.config(tmp_path)
    Path(config.out).mkdir()
    (Path(config.out) / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match="the folder holds other files; give a new one or that of a run"):
        open_run(config, lambda _: None)
    assert [path.name for path in Path(config.out).iterdir()] == ["letter.txt"]
