"""A run that starts from a base: weights it keeps, losses it measures, bases it refuses, exact resume."""

import csv
import dataclasses
import json
import shutil
import signal
from collections import Counter
from pathlib import Path

import pytest
import torch

from ffn import disk
from ffn.cli import main
from ffn.files.atomic import sha256_file
from ffn.files.checkpoints import list_checkpoints
from ffn.files.shards import open_shards
from ffn.gpt.adapters import adapter_config, load_adapters, merge_adapters
from ffn.gpt.transformer import Transformer
from ffn.text.tokenizer import ByteTokenizer, HFTokenizer
from ffn.train.checkpoint import save_checkpoint
from ffn.train.config import TrainConfig
from ffn.train.loop import train
from ffn.train.optim import ScheduledOptimizer
from ffn.train.run_folder import read_config
from ffn.train.steps import evaluate
from tests import tiny
from tests.tiny import outcome, quiet

NEW_TEXT = "".join(f"item {i}: [{'#' * (i % 7)}] and {i + 1} more\n" for i in range(300))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on one text; not to be written to."""
    folder = tmp_path_factory.mktemp("base")
    words = ["train.steps=400", "train.eval_every=200", "model.num_layers=2", "train.log_every=100"]
    train(tiny.config(folder, *words), quiet)
    return folder / "run"


def tuned(folder: Path, base: Path, *words: str) -> TrainConfig:
    """Return a configuration that trains the base on another text into `folder/run`."""
    (folder / "new.txt").write_text(NEW_TEXT)
    given = [f"base={base}", f"data.path={folder / 'new.txt'}", f"out={folder / 'run'}"]
    return read_config(None, [*given, *tiny.WORDS, *words])


def rows(config: TrainConfig) -> list[dict[str, str]]:
    with (Path(config.out) / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def weights(model: Transformer) -> dict[str, torch.Tensor]:
    return model.state_dict()


def test_the_base_decides_the_defaults_of_the_config(base: Path, tmp_path: Path) -> None:
    config = tuned(tmp_path, base, "model.dropout=0.25")
    there = read_config(base / "config.toml")
    assert config.model == dataclasses.replace(there.model, dropout=0.25)
    assert config.data.tokenizer == str(base / "tokenizer.json")
    assert read_config(None, [f"base={base}"]).out == "runs/tuned"
    train(config, quiet)
    assert read_config(Path(config.out) / "config.toml") == config
    shutil.move(base, base.parent / "moved")
    try:
        assert read_config(Path(config.out) / "config.toml") == config, "the run's own config is complete"
    finally:
        shutil.move(base.parent / "moved", base)


def test_loss_falls_on_the_new_text_and_rises_on_the_old(base: Path, tmp_path: Path) -> None:
    config = tuned(tmp_path, base, "train.steps=60", "train.eval_every=30", "train.eval_batches=0")
    said: list[str] = []
    summary = train(config, said.append)
    measured = [row for row in rows(config) if row["val_loss"]]
    assert [int(row["step"]) for row in measured] == [0, 30, 60]
    new, old = ([float(row[c]) for row in measured] for c in ("val_loss", "base_val_loss"))
    assert new[0] > new[1] > new[2]
    assert old[0] < min(old[1:])
    first = rows(config)[0]
    assert (first["tokens"], first["lr"], first["train_loss"], first["grad_norm"]) == ("0", "", "", "")
    before = disk.load(base)
    assert evaluate(
        before, torch.tensor(list(NEW_TEXT[int(len(NEW_TEXT) * 0.9) :].encode()))
    ) == pytest.approx(new[0])
    text = tiny.TEXT[int(len(tiny.TEXT) * 0.9) :]
    assert evaluate(before, torch.tensor(list(text.encode()))) == pytest.approx(old[0], rel=1e-5)
    assert (summary["val_loss_before"], summary["base_val_loss_before"]) == (new[0], old[0])
    assert summary["base_val_loss"] == old[2]
    assert json.loads((Path(config.out) / "summary.json").read_text()) == summary
    assert any(line.startswith("before       ") for line in said)
    assert any(line.startswith("base's text  ") and line.endswith(f"{old[0]:.4f} before") for line in said)


@pytest.mark.parametrize("only", ["ffn", "last:1", "lora"])
def test_frozen_weights_stay_bit_for_bit(only: str, base: Path, tmp_path: Path) -> None:
    config = tuned(tmp_path, base, f"train.only={only}", "train.weight_decay=0.1", "train.l1=0.01")
    said: list[str] = []
    train(config, said.append)
    assert any(line.startswith("part ") and "trained" in line for line in said), "the table"
    before, after = weights(disk.load(base)), weights(disk.load(config.out))
    state = list_checkpoints(Path(config.out))[-1] / "optimizer.safetensors"
    stepped = {name.split("/")[1] for name in open_shards(state) if name.startswith("optimizer/")}
    moves = {"ffn": ".feed_forward.", "last:1": "blocks.1.", "lora": ".lora_"}[only]
    for name, tensor in before.items():
        learns = moves in name or (only == "last:1" and name.startswith("norm"))
        assert torch.equal(after[name], tensor) == (not learns), name
    assert all(moves in name or name.startswith("norm") for name in stepped)
    assert stepped


def test_adapters_are_saved_alone(base: Path, tmp_path: Path) -> None:
    words = ["train.only=lora", "train.adapter.rank=3", 'train.adapter.targets=["up_proj", "attention"]']
    config = tuned(tmp_path, base, *words, "train.steps=24")
    said: list[str] = []
    summary = train(config, said.append)
    run = Path(config.out)
    assert summary["adapters"] == "adapter.safetensors"
    assert any(line.startswith(f"adapters     {run / 'adapter.safetensors'}") for line in said)
    trained, model = disk.load(run), disk.load(base)
    found = adapter_config(trained)
    assert found is not None
    assert (found.rank, found.targets) == (3, ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj"))
    load_adapters(run, model)
    tokens = torch.arange(12).view(1, 12)
    with torch.no_grad():
        expected = trained(tokens)
        assert torch.equal(model(tokens), expected)
        merge_adapters(model)
        torch.testing.assert_close(model(tokens), expected)
    assert set(weights(model)) == set(weights(disk.load(base)))
    again = tuned(tmp_path, run, f"out={tmp_path / 'again'}", "train.steps=2")
    train(again, quiet)
    assert adapter_config(disk.load(again.out)) is None, "a base's adapters are merged"


@pytest.mark.parametrize("only", ["lora", "ffn", "all"])
def test_an_interrupted_run_resumes_bit_for_bit(only: str, base: Path, tmp_path: Path) -> None:
    words = [f"train.only={only}", "train.adapter.dropout=0.1", "train.layer_decay=0.8"]
    whole = tuned(tmp_path, base, *words, f"out={tmp_path / 'whole'}")
    train(whole, quiet)
    config = tuned(tmp_path, base, *words)

    def interrupt(line: str) -> None:
        if line.startswith("step 6/"):
            signal.raise_signal(signal.SIGINT)

    assert train(config, interrupt)["stopped"] == "interrupted"
    said: list[str] = []
    assert train(config, said.append)["stopped"] == "finished"
    assert not any(line.startswith("before ") for line in said)
    assert outcome(Path(config.out)) == outcome(Path(whole.out))
    if only == "lora":
        adapters = [Path(c.out) / "adapter.safetensors" for c in (config, whole)]
        assert adapters[0].read_bytes() == adapters[1].read_bytes()


def test_a_replaced_base_is_refused(base: Path, tmp_path: Path) -> None:
    place = tmp_path / "base"
    shutil.copytree(base, place)
    config = tuned(tmp_path, place)
    train(config, quiet)
    other = disk.load(place)
    with torch.no_grad():
        other.norm.weight.add_(1.0)
    shutil.rmtree(place / "checkpoints")
    disk.save_model(place, other)
    said: list[str] = []
    with pytest.raises(ValueError, match=r"^no checkpoint in .* is good"):
        train(config, said.append)
    assert any("refused: it belongs to another run" in line for line in said)
    other = tuned(tmp_path, base)
    with pytest.raises(ValueError, match=r"holds a run of another configuration: base=.* where the run has"):
        train(other, quiet)


def test_a_hugging_face_folder_as_base(tmp_path: Path) -> None:
    """Half precision trains in float32; the vocabulary may be larger than the tokenizer's; no old text."""
    pytest.importorskip("tokenizers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    numbers = {c: i for i, c in enumerate(sorted(set(NEW_TEXT)))}
    made = Tokenizer(models.WordLevel({**numbers, "?": len(numbers)}, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    model = Transformer(dataclasses.replace(tiny.MODEL, vocab_size=len(numbers) + 9)).bfloat16()
    folder = tmp_path / "hf"
    disk.save(folder, model, format="hf")
    (folder / "tokenizer.json").write_text(made.to_str())
    config = tuned(tmp_path, folder, "train.window=8", "train.sample_prompt=item")
    assert config.model.vocab_size == len(numbers) + 9
    said: list[str] = []
    train(config, said.append)
    assert any(
        line.startswith("base ") and line.endswith("without the text it was trained on") for line in said
    )
    assert "base_val_loss" not in rows(config)[0]
    after = disk.load(config.out)
    assert after.embedding.weight.dtype == torch.float32
    assert after.config.max_seq_len == tiny.MODEL.max_seq_len
    assert int(rows(config)[-1]["tokens"]) == 12 * 2 * 8
    assert isinstance(disk.load_tokenizer(config.out), HFTokenizer)


@pytest.mark.parametrize("best", ["the last", "another"])
def test_the_command_hashes_each_file_of_the_base_once(
    best: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, hashed = shutil.copytree(base, tmp_path / "base"), []
    if best == "another":
        model, words = disk.load(base), {"config": "c", "data": "d"}
        save_checkpoint(place, 999, model, ScheduledOptimizer(model), {**words, "best": "step-000400"})
    for module in ("ffn.files.checkpoints", "ffn.text.corpus"):
        monkeypatch.setattr(f"{module}.sha256_file", lambda path: hashed.append(path) or sha256_file(path))
    (tmp_path / "new.txt").write_text(NEW_TEXT)
    words = [f"data.path={tmp_path / 'new.txt'}", f"out={tmp_path / 'run'}", *tiny.WORDS, "train.steps=1"]
    for _ in range(2):  # the second command finds a finished run
        hashed.clear()
        assert main(["train", "--from", str(place), *words]) == 0
        counts = Counter(path for path in hashed if path.is_relative_to(place))
        assert set(counts.values()) == {1}
        checkpoints = {path.parent.name for path in counts if path.suffix == ".safetensors"}
        assert len(checkpoints) == (1 if best == "the last" else 2)
        assert place / "data" / "train.bin" in counts


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["model.dim=32"],
            r"model\.dim must be 16, got 32",
        ),
        (
            ["data.tokenizer=char"],
            r"^data\.tokenizer must be .*tokenizer\.json, .* got char",
        ),
        (["train.window=17"], r"^train\.window must be .*16, got 17$"),
        (
            ["train.only=lats:2"],
            r"^train\.only.*lats:2",
        ),
        (["train.only=last:3"], r"last:3"),
        (["train.only=head"], r"head"),
        (["train.adapter.rank=0"], r"^train\.adapter\.rank.* 0$"),
        (['train.adapter.targets=["mlp"]'], r"^train\.adapter\.targets.* mlp$"),
        (["train.layer_decay=2"], r"^train\.layer_decay.* 2\.0$"),
    ],
)
def test_values_that_do_not_fit_the_base_are_refused(
    words: list[str], message: str, base: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        train(tuned(tmp_path, base, *words), quiet)


def test_unusable_bases_are_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"absent: neither"):
        tuned(tmp_path, tmp_path / "absent")
    bare = tmp_path / "bare"
    disk.save(bare, Transformer(tiny.MODEL))
    with pytest.raises(ValueError, match=r"^data\.tokenizer must be .*bare"):
        train(tuned(tmp_path, bare), quiet)
    train(tuned(tmp_path, bare, "data.tokenizer=byte", "train.steps=1"), quiet)
    assert isinstance(disk.load_tokenizer(tmp_path / "run"), ByteTokenizer)
    headless = tmp_path / "headless"
    disk.save(headless, Transformer(dataclasses.replace(tiny.MODEL, head="none")))
    with pytest.raises(ValueError, match=r"^base=.*headless must have a head"):
        train(tuned(tmp_path, headless, "data.tokenizer=byte", f"out={tmp_path / 'b'}"), quiet)
    (tmp_path / "abc.txt").write_text("abc\n" * 200)
    letters = tiny.config(
        tmp_path, f"data.path={tmp_path / 'abc.txt'}", "data.tokenizer=char", "train.steps=1"
    )
    train(dataclasses.replace(letters, out=str(tmp_path / "letters")), quiet)
    config = tuned(tmp_path, tmp_path / "letters", f"out={tmp_path / 'c'}")
    with pytest.raises(ValueError, match=r"^character 'i'"):
        train(config, quiet)
    assert not (tmp_path / "c" / "config.toml").exists()


def test_the_command(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "new.txt").write_text(NEW_TEXT)
    words = [f"data.path={tmp_path / 'new.txt'}", f"out={tmp_path / 'run'}", *tiny.WORDS]
    assert main(["train", "--from", str(base), *words, "train.only=lora"]) == 0
    out = capsys.readouterr().out
    assert "backward ends before the embedding" in out
    assert "base's text  " in out
    assert main(["generate", str(tmp_path / "run"), "--tokens", "3", "--device", "cpu"]) == 0
    assert main(["eval", str(tmp_path / "run"), "--device", "cpu"]) == 0
    capsys.readouterr()
    assert main(["train", *words, f"--from={base}", "train.only=lora"]) == 0, (
        "the same, and so it is finished"
    )
    assert "finished before" in capsys.readouterr().out
    assert main(["train", "--from", str(tmp_path / "absent"), *words]) == 2
