"""The configuration of a run: defaults, files, words, and the folder that holds it."""

import dataclasses
import inspect
from pathlib import Path

import numpy as np
import pytest

from ffn.files.dataclass_toml import from_toml, to_toml
from ffn.gpt.transformer import Transformer
from ffn.text.corpus import DataConfig
from ffn.train.config import LoopConfig, TrainConfig, fingerprint
from ffn.train.loop import train
from ffn.train.optim import ScheduledOptimizer
from ffn.train.run_folder import check_options, open_run, read_config
from tests import tiny
from tests.conftest import ROOT


def test_words_override_the_file_and_the_file_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("[train]\nsteps = 7\nlr = 0.5\n[model]\ndim = 96\n")
    config = read_config(tmp_path / "c.toml", ["train.lr=0.25"])
    assert config.train == dataclasses.replace(LoopConfig(), steps=7, lr=0.25)
    assert config.model == dataclasses.replace(TrainConfig().model, dim=96)
    assert read_config(None) == TrainConfig()


SHIPPED = [
    file for file in sorted((ROOT / "configs").glob("*.toml")) if "[head]" not in file.read_text("utf-8")
]


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_shipped_configs_are_read(file: Path) -> None:
    assert read_config(file) != TrainConfig()


def test_errors_in_a_file_name_the_file(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("[train]\nlr_rate = 0.5\n")
    with pytest.raises(ValueError, match=r"c\.toml: train\.lr_rate is not a key"):
        read_config(tmp_path / "c.toml")
    (tmp_path / "c.toml").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"c\.toml: 'utf-8'"):
        read_config(tmp_path / "c.toml")
    with pytest.raises(ValueError, match=r"absent\.toml: .*No such file"):
        read_config(tmp_path / "absent.toml")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, r"^steps\b.* got 0$"),
        ({"lr": -1.0}, r"^lr\b.* got -1.0$"),
        ({"l1": float("nan")}, r"^l1\b.* got nan$"),
        ({"sample_tokens": -5}, r"^sample_tokens\b.* got -5$"),
        ({"sample_temperature": -1.0}, r"^sample_temperature\b.* got -1.0$"),
        ({"lr_floor": -3.0}, r"^lr_floor\b.* got -3.0$"),
        ({"window": -1}, r"^window\b.* got -1$"),
        ({"only": "tail"}, r"^only\b.*tail"),
        ({"layer_decay": 0.0}, r"^layer_decay\b.* got 0.0$"),
        ({"momentum": 2.0}, r"^momentum\b.* got 2.0$"),
        ({"betas": (0.9,)}, r"^betas\b.* got \[0.9\]$"),
        ({"seed": 10**20}, r"^seed\b.* got 10{20}$"),
        ({"lr": float("inf")}, r"^lr\b.* got inf$"),
        ({"sample_prompt": ""}, r"^sample_prompt\b"),
    ],
)
def test_values_out_of_range_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoopConfig(**change)


def test_the_optimizer_is_given_every_option(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, object] = {}
    parameters = inspect.signature(ScheduledOptimizer).parameters
    monkeypatch.setattr(
        "ffn.train.options.ScheduledOptimizer",
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


def test_empty_paths_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^data\.path must be .* got ''$"):
        read_config(None, ["data.path="])
    with pytest.raises(ValueError, match=r"^out must be a folder, got ''$"):
        read_config(None, ["out="])


def test_out_must_not_be_a_file(tmp_path: Path) -> None:
    config = tiny.config(tmp_path)
    with pytest.raises(ValueError, match=r"^out must be a folder, .*text\.txt$"):
        train(dataclasses.replace(config, out=config.data.path), tiny.quiet)


def test_values_of_numpy_and_path_round_trip() -> None:
    loop = LoopConfig(lr=np.float64(3e-3), steps=np.int64(5), betas=[0.9, np.float64(0.95)])
    config = TrainConfig(out=Path("a"), data=DataConfig(path=Path("b")), train=loop)
    assert from_toml(TrainConfig, to_toml(config)) == config
    with pytest.raises(ValueError, match=r"^model must be a TransformerConfig, got 3$"):
        TrainConfig(model=3)


def test_fingerprint_ignores_where_a_run_takes_place() -> None:
    config = TrainConfig()
    elsewhere = dataclasses.replace(config, out="x", device="cpu")
    assert fingerprint(elsewhere) == fingerprint(config)
    other = dataclasses.replace(config, train=LoopConfig(seed=1))
    assert fingerprint(other) != fingerprint(config)


def test_the_tokenizer_decides_the_vocabulary_size(tmp_path: Path) -> None:
    config = tiny.config(tmp_path, "data.tokenizer=char")
    Path(config.out).mkdir()
    resolved, corpus = open_run(config, None, tiny.quiet)
    assert resolved.model.vocab_size == corpus.tokenizer.vocab_size == len(set(tiny.TEXT))
    assert read_config(Path(config.out) / "config.toml") == resolved
    wrong = tiny.config(tmp_path, "data.tokenizer=char", "model.vocab_size=99")
    with pytest.raises(ValueError, match=r"^model\.vocab_size must be \d+, .* got 99"):
        open_run(wrong, None, tiny.quiet)


def test_a_folder_with_other_files_is_refused_and_unchanged(tmp_path: Path) -> None:
    config = tiny.config(tmp_path)
    Path(config.out).mkdir()
    (Path(config.out) / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match=r"^out="):
        open_run(config, None, tiny.quiet)
    assert [path.name for path in Path(config.out).iterdir()] == ["letter.txt"]


@pytest.mark.parametrize(
    "text", ["# another tool's\nname = 'x'\n", "# for later\n[train]\nlr = 0.5\n", b"\xff"]
)
def test_a_config_that_no_run_wrote_is_refused_and_unchanged(text: str | bytes, tmp_path: Path) -> None:
    config = tiny.config(tmp_path)
    file = Path(config.out) / "config.toml"
    file.parent.mkdir()
    file.write_bytes(content := text.encode() if isinstance(text, str) else text)
    with pytest.raises(ValueError, match=r"^out="):
        open_run(config, None, tiny.quiet)
    assert [path.name for path in file.parent.iterdir()] == ["config.toml"]
    assert file.read_bytes() == content


def test_a_damaged_config_of_a_run_is_named(tmp_path: Path) -> None:
    config = tiny.config(tmp_path)
    file = Path(config.out) / "config.toml"
    (file.parent / "checkpoints" / "step-000001").mkdir(parents=True)
    file.write_text("[train]\nbogus = 1\n")
    with pytest.raises(ValueError, match=r"run.config\.toml: train\.bogus is not a key"):
        open_run(config, None, tiny.quiet)


def test_a_run_without_checkpoints_starts_anew(tmp_path: Path) -> None:
    Path(tiny.config(tmp_path).out).mkdir()
    for lr in ("0.5", "0.25"):
        resolved, _ = open_run(tiny.config(tmp_path, f"train.lr={lr}"), None, tiny.quiet)
        assert read_config(Path(resolved.out) / "config.toml").train.lr == float(lr)


def test_an_absent_text_leaves_no_files(tmp_path: Path) -> None:
    config = tiny.config(tmp_path, "data.path=absent.txt")
    Path(config.out).mkdir()
    with pytest.raises(ValueError, match=r"^data.path must be .* absent.txt$"):
        open_run(config, None, tiny.quiet)
    assert not list(Path(config.out).iterdir())


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("model.causal=false", r"^train\.sample_tokens must be 0 .* got 5$"),
        ("train.window=17", r"^train\.window must be .*16, got 17$"),
        ("train.only=last:2", r"^train\.only must be .*last:1 .* got last:2$"),
        ("train.only=head", r"^train\.only=head needs an untied head; .* train\.only=last:1$"),
    ],
)
def test_options_that_do_not_fit_the_model_are_refused_before_any_work(
    word: str, message: str, tmp_path: Path
) -> None:
    config = tiny.config(tmp_path, word)
    with pytest.raises(ValueError, match=message):
        train(config, tiny.quiet)
    assert not Path(config.out).exists()


@pytest.mark.parametrize("word", ["model.tie_embeddings=false", "model.head=mlm"])
def test_a_head_with_weights_of_its_own_trains_alone(word: str, tmp_path: Path) -> None:
    check_options(tiny.config(tmp_path, "train.only=head", word))
