"""The configuration of a run: defaults, files, words, and the folder that keeps it."""

import dataclasses
import inspect
from pathlib import Path

import numpy as np
import pytest

from ffn.files.dataclass_toml import from_toml, to_toml
from ffn.gpt.transformer import Transformer
from ffn.text.corpus import DataConfig
from ffn.train.config import LoopConfig, TrainConfig, fingerprint, open_run, read_config
from ffn.train.loop import train
from ffn.train.optim import ScheduledOptimizer
from tests import tiny
from tests.conftest import ROOT


def test_defaults_then_file_then_words(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("[train]\nsteps = 7\nlr = 0.5\n[model]\ndim = 96\n")
    config = read_config(tmp_path / "c.toml", ["train.lr=0.25"])
    assert config.train == dataclasses.replace(LoopConfig(), steps=7, lr=0.25)
    assert config.model == dataclasses.replace(TrainConfig().model, dim=96)
    assert read_config(None) == TrainConfig()


SHIPPED = [
    file for file in sorted((ROOT / "configs").glob("*.toml")) if "[fit]" not in file.read_text("utf-8")
]


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)  # [fit] is of ffn.classify.recipe
def test_the_shipped_files_are_read(file: Path) -> None:
    assert read_config(file) != TrainConfig()


def test_a_wrong_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("[train]\nlr_rate = 0.5\n")
    with pytest.raises(ValueError, match=r"c\.toml: train\.lr_rate: no such key; did you mean train\.lr\?"):
        read_config(tmp_path / "c.toml")
    (tmp_path / "c.toml").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"c\.toml: 'utf-8' codec can't decode byte 0xff"):
        read_config(tmp_path / "c.toml")
    with pytest.raises(ValueError, match=r"absent\.toml: cannot read this config: No such file"):
        read_config(tmp_path / "absent.toml")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "^steps: wants 1 or more; got 0$"),
        ({"lr": -1.0}, "^lr: wants 0 or more; got -1.0$"),
        ({"l1": float("nan")}, "^l1: wants 0 or more; got nan$"),
        ({"sample_tokens": -5}, "^sample_tokens: wants 0 or more; got -5$"),
        ({"sample_temperature": -1.0}, "^sample_temperature: wants 0 or more; got -1.0$"),
        ({"lr_floor": -3.0}, r"^lr_floor: wants a number in \[0, 1\]; got -3.0$"),
        ({"window": -1}, "^window: wants 0 or more; got -1$"),
        (
            {"only": "tail"},
            "^only: 'tail' is no choice of what trains; want head, ffn, last:K, lora or all, with",
        ),
        ({"layer_decay": 0.0}, "^layer_decay: wants a number above 0, 1 at most; got 0.0$"),
        ({"momentum": 2.0}, r"^momentum: wants a number in \[0, 1\); got 2.0$"),
        ({"betas": (0.9,)}, r"^betas: wants two numbers in \[0, 1\); got \[0.9\]$"),
        ({"seed": 10**20}, r"^seed: wants a whole number of 64 bits; got 10{20}$"),
        ({"lr": float("inf")}, "^lr: wants 0 or more; got inf$"),
        ({"sample_prompt": ""}, "^sample_prompt: wants at least one character$"),
    ],
)
def test_values_out_of_range_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoopConfig(**change)


def test_the_optimizer_is_given_every_option(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, object] = {}
    parameters = inspect.signature(ScheduledOptimizer).parameters
    monkeypatch.setattr(
        "ffn.train.config.ScheduledOptimizer",
        lambda model, optimizer, **options: given.update(options, model=model, optimizer=optimizer),
    )
    options = {
        "optimizer": "adamw", "lr": 0.1, "muon_lr": 0.2, "weight_decay": 0.3, "l1": 0.4, "betas": (0.5, 0.6),
        "momentum": 0.7, "layer_decay": 0.8,
    }  # fmt: skip
    model = Transformer(tiny.MODEL, device="meta")
    LoopConfig(**options).build_optimizer(model)
    assert given == {"model": model, **options}
    assert set(given) == set(parameters)


def test_nothing_is_no_path() -> None:
    with pytest.raises(
        ValueError, match=r"^data\.path: wants a file, a folder, a pattern or stdlib; got ''$"
    ):
        read_config(None, ["data.path="])
    with pytest.raises(ValueError, match=r"^out: wants a folder; got ''$"):
        read_config(None, ["out="])


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    config = tiny.config(tmp_path)
    with pytest.raises(ValueError, match=r"text\.txt: is a file; give a folder$"):
        train(dataclasses.replace(config, out=config.data.path), tiny.quiet)


def test_a_run_in_python_is_as_one_in_toml() -> None:
    loop = LoopConfig(lr=np.float64(3e-3), steps=np.int64(5), betas=[0.9, np.float64(0.95)])
    config = TrainConfig(out=Path("a"), data=DataConfig(path=Path("b")), train=loop)
    assert from_toml(TrainConfig, to_toml(config)) == config
    with pytest.raises(ValueError, match=r"^model: wants a TransformerConfig; got 3$"):
        TrainConfig(model=3)


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


@pytest.mark.parametrize(
    "text", ["# another tool's\nname = 'x'\n", "# for later\n[train]\nlr = 0.5\n", b"\xff"]
)
def test_a_config_that_no_run_wrote_is_left_alone(text: str | bytes, tmp_path: Path) -> None:
    config = tiny.config(tmp_path)
    file = Path(config.out) / "config.toml"
    file.parent.mkdir()
    file.write_bytes(content := text.encode() if isinstance(text, str) else text)
    with pytest.raises(ValueError, match="the folder holds other files; give a new one or that of a run"):
        open_run(config, lambda _: None)
    assert [path.name for path in file.parent.iterdir()] == ["config.toml"]
    assert file.read_bytes() == content


def test_a_damaged_config_of_a_run_is_named(tmp_path: Path) -> None:
    config = tiny.config(tmp_path)
    file = Path(config.out) / "config.toml"
    (file.parent / "checkpoints" / "step-000001").mkdir(parents=True)
    file.write_text("[train]\nbogus = 1\n")
    with pytest.raises(ValueError, match=r"run.config\.toml: train\.bogus: no such key"):
        open_run(config, lambda _: None)


def test_a_run_without_checkpoints_is_begun_anew(tmp_path: Path) -> None:
    Path(tiny.config(tmp_path).out).mkdir()
    for lr in ("0.5", "0.25"):
        resolved, _ = open_run(tiny.config(tmp_path, f"train.lr={lr}"), lambda _: None)
        assert read_config(Path(resolved.out) / "config.toml").train.lr == float(lr)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.path=absent.txt"], "^data.path=absent.txt: no such file"),
        (["model.causal=false"], "^train.sample_tokens: wants 0 with model.causal=false, .*; got 5$"),
    ],
)
def test_a_refused_run_leaves_nothing(words: list[str], message: str, tmp_path: Path) -> None:
    config = tiny.config(tmp_path, *words)
    Path(config.out).mkdir()
    with pytest.raises(ValueError, match=message):
        open_run(config, lambda _: None)
    assert not list(Path(config.out).iterdir())
