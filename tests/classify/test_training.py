"""Training from scratch and from pretrained models: the written folder and its content."""

import csv
import dataclasses
import json
from pathlib import Path

import pytest
import torch

import ffn
from ffn.classify import ClassifyConfig, load_classifier, read_config, train
from ffn.files.dataclass_toml import from_toml
from ffn.gpt.adapters import add_adapters
from ffn.gpt.transformer import Transformer, TransformerConfig
from ffn.text.tokenizer import ByteTokenizer
from tests.classify.samples import PRETRAINED, config, quiet, texts, write_base, write_table

FILES = {"model.safetensors", "head.safetensors", "classifier.json", "tokenizer.json", "config.toml",
         "metrics.json", "metrics.csv", "predictions.csv"}  # fmt: skip
PICTURES = {"curves.png", "confusion.png"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


def test_training_writes_the_folder(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    said: list[str] = []
    words = ["data.tokenizer=word", "train.epochs=6", "train.lr=2e-2"]
    summary = train(config(tmp_path, *words, count=150), said.append)
    run = tmp_path / "run"
    names = {path.name for path in run.iterdir()}
    assert names - PICTURES == FILES
    assert json.loads((run / "metrics.json").read_text()) == summary
    assert summary["test"]["accuracy"] > 0.6
    assert summary["rows"] == {"train": 120, "val": 15, "test": 15}
    assert summary["parameters"] == summary["trained_parameters"]
    assert any("accuracy" in line and "f1" in line for line in said)
    with (run / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    classifier = load_classifier(run)
    found = classifier.predict([row["text"] for row in rows])
    assert [classifier.classes[i] for i in found.argmax(1)] == [row["predicted"] for row in rows]
    right = sum(row["predicted"] == row["label"] for row in rows) / len(rows)
    assert right == pytest.approx(summary["test"]["accuracy"])
    order = [(row["predicted"] == row["label"], float(row["of_label"])) for row in rows]
    assert order == sorted(order), "mistakes first, the worst at the top"
    assert isinstance(ffn.load(run), Transformer)
    assert read_config(run / "config.toml").model.vocab_size == classifier.encode.tokenizer.vocab_size
    with pytest.raises(ValueError, match=r"^out=.*run already exists"):
        train(config(tmp_path), quiet)


def test_equal_configurations_give_equal_folders(tmp_path: Path) -> None:
    train(config(tmp_path, "train.word_dropout=0.2", "model.dropout=0.1"), quiet)
    train(config(tmp_path, "train.word_dropout=0.2", "model.dropout=0.1", f"out={tmp_path / 'other'}"), quiet)
    for name in ("model.safetensors", "head.safetensors", "predictions.csv"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()


@pytest.mark.parametrize("what", ["head", "ffn", "last:1", "all", "lora"])
def test_only_the_chosen_parameters_change(what: str, base: Path, tmp_path: Path) -> None:
    words = [f"base={base}", f"train.only={what}", "train.epochs=2", "train.lr=1e-2", "train.metric=loss"]
    said: list[str] = []
    summary = train(config(tmp_path, *words, "train.adapter.rank=2", "train.patience=0"), said.append)
    before, after = ffn.load(base).state_dict(), ffn.load(tmp_path / "run").state_dict()
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    inside = ["blocks.0.feed_forward.", "blocks.1.feed_forward."]
    blocks = {
        "head": [], "ffn": inside, "last:1": ["blocks.1.", "norm."], "all": [""], "lora": inside,
    }[what]  # fmt: skip
    assert changed == {name for name in after if any(name.startswith(block) for block in blocks)}
    assert set(after) == set(before), "adapters are merged; the tied head of the decoder has no weights"
    assert any(line.startswith("cached ") for line in said) == (what == "head")
    assert (summary["cache_seconds"] is not None) == (what == "head")
    assert any("task head" in line for line in said)
    total = sum(p.numel() for p in after.values()) + 3 * 16  # pooling=last has no bias
    assert summary["parameters"] == total
    assert (summary["trained_parameters"] == total) == (what == "all")


def test_a_base_keeps_its_shape_but_not_its_dropout(base: Path, tmp_path: Path) -> None:
    train(config(tmp_path, f"base={base}", "model.dropout=0.25", "train.epochs=1"), quiet)
    expected = dataclasses.replace(PRETRAINED, head="none", dropout=0.25)
    assert ffn.load(tmp_path / "run").config == expected
    written = (tmp_path / "run" / "config.toml").read_text()
    assert from_toml(ClassifyConfig, written).model == expected
    for word, message in (
        ("model.num_layers=3", r"model\.num_layers"),
        ("data.tokenizer=char", r"^data\.tokenizer"),
    ):
        with pytest.raises(ValueError, match=message):
            train(config(tmp_path, f"base={base}", word, f"out={tmp_path / 'other'}"), quiet)
    bare = tmp_path / "bare"
    ffn.save(bare, Transformer(PRETRAINED))
    with pytest.raises(ValueError, match=r"^data\.tokenizer must be .*bare"):
        train(config(tmp_path, f"base={bare}", f"out={tmp_path / 'other'}"), quiet)
    words = [f"base={bare}", f"data.tokenizer={base / 'tokenizer.json'}", "train.epochs=1"]
    train(config(tmp_path, *words, f"out={tmp_path / 'other'}"), quiet)
    assert load_classifier(tmp_path / "other").predict(["a wave"]).shape == (1, 3)


@pytest.mark.parametrize("what", ["all", "lora"])
def test_the_adapters_of_a_base_are_merged(what: str, base: Path, tmp_path: Path) -> None:
    model = ffn.load(base)
    add_adapters(model)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("lora_B"):
                p.normal_()
    ffn.save(tmp_path / "adapted", model)
    words = [
        f"base={tmp_path / 'adapted'}",
        f"data.tokenizer={base / 'tokenizer.json'}",
        f"train.only={what}",
    ]
    train(config(tmp_path, *words, "train.epochs=1", "train.lr=0"), quiet)
    found, tokens = ffn.load(tmp_path / "run"), torch.arange(20)[None]
    assert set(found.state_dict()) == set(ffn.load(base).state_dict())
    torch.testing.assert_close(found.hidden(tokens), model.eval().hidden(tokens))


def test_the_cache_does_not_change_the_weights(base: Path, tmp_path: Path) -> None:
    write_table(tmp_path / "texts.csv", [(text.ljust(60), name) for text, name in texts(90)])
    for out, cache in (("run", "true"), ("slow", "false")):
        words = [f"base={base}", "train.only=head", f"train.cache={cache}", f"out={tmp_path / out}"]
        train(config(tmp_path, *words), quiet)
    heads = [(tmp_path / out / "head.safetensors").read_bytes() for out in ("run", "slow")]
    assert heads[0] == heads[1]


def test_word_dropout_turns_the_cache_off(base: Path, tmp_path: Path) -> None:
    said: list[str] = []
    words = [f"base={base}", "train.only=head", "train.epochs=1", "train.word_dropout=0.1"]
    assert train(config(tmp_path, *words), said.append)["cache_seconds"] is None
    assert any("train.word_dropout" in line for line in said)


def test_an_ensemble_averages_its_seeds(tmp_path: Path) -> None:
    words = ["train.seeds=[1, 2, 3]", "train.epochs=2", "train.metric=loss"]
    summary = train(config(tmp_path, *words), quiet)
    assert [member["seed"] for member in summary["members"]] == [1, 2, 3]
    together = load_classifier(tmp_path / "run")
    assert len(together.members) == 3
    each = []
    for seed in (1, 2, 3):
        train(config(tmp_path, *words[1:], f"train.seeds=[{seed}]", f"out={tmp_path / str(seed)}"), quiet)
        each.append(load_classifier(tmp_path / str(seed)).predict(["bread and soup", "a wave"]))
    torch.testing.assert_close(together.predict(["bread and soup", "a wave"]), sum(each) / 3)
    assert not torch.allclose(each[0], each[1])
    rows = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["seed", "1", "1", "2", "2", "3", "3"]


def test_regression_predicts_in_the_units_of_the_labels(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    rows = [(text, 1000.0 + 100.0 * (name == "food")) for text, name in texts(120)]
    write_table(tmp_path / "texts.csv", rows)
    summary = train(
        config(tmp_path, "data.tokenizer=word", "train.loss=mse", "train.epochs=6", "train.lr=2e-2"), quiet
    )
    assert summary["test"]["mse"] < 2500.0, "better than the mean"
    assert summary["val"].keys() >= {"mse", "r2"}
    values = load_classifier(tmp_path / "run").predict(["some bread", "a drum"])
    assert values[0] > 1050.0 > values[1]
    assert not (tmp_path / "run" / "confusion.png").exists()


def test_binary_cross_entropy_has_one_logit(tmp_path: Path) -> None:
    words = ["train.loss=binary_cross_entropy", "train.class_weights=balanced", "train.metric=roc_auc"]
    summary = train(config(tmp_path, *words, classes=2), quiet)
    classifier = load_classifier(tmp_path / "run")
    assert classifier.members[0].num_classes == 1
    assert classifier.predict(["bread"]).shape == (1, 2)
    assert "roc_auc" in summary["test"]


def test_a_decoder_from_scratch_pools_its_last_token(tmp_path: Path) -> None:
    words = ["model.causal=true", "model.position=rotary", "train.epochs=1", "data.tokenizer=byte"]
    train(config(tmp_path, *words), quiet)
    facts = json.loads((tmp_path / "run" / "classifier.json").read_text())
    assert (facts["pooling"], facts["bias"], facts["classes"]) == ("last", False, ["food", "music", "sea"])


def test_padding_may_be_token_0() -> None:
    from ffn.classify.training import _pad

    learned = {"position": "learned", "position_offset": 1, "causal": False, "pad_token_id": 0}
    model = Transformer(dataclasses.replace(PRETRAINED, **learned), device="meta")
    model.origin = {"pad_token_id": 3}
    assert _pad(model) == 0


def test_a_classifier_can_be_the_base(tmp_path: Path) -> None:
    train(config(tmp_path, "train.epochs=1"), quiet)
    words = [f"base={tmp_path / 'run'}", "train.only=head", f"out={tmp_path / 'next'}"]
    train(config(tmp_path, *words, "train.epochs=1"), quiet)
    assert ffn.load(tmp_path / "next").config == ffn.load(tmp_path / "run").config


@pytest.mark.parametrize("done", [0, 1])
def test_ctrl_c_keeps_finished_members(done: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ffn.classify import loop

    epochs, run_epoch = 0, loop._Loop.epoch

    def interrupted(self, epoch: int) -> dict[str, float]:
        nonlocal epochs
        if epochs == 2 * done:
            raise KeyboardInterrupt
        epochs += 1
        return run_epoch(self, epoch)

    monkeypatch.setattr(loop._Loop, "epoch", interrupted)
    settings = config(tmp_path, "train.seeds=[1, 2]", "train.epochs=2")
    if not done:
        with pytest.raises(KeyboardInterrupt):
            train(settings, quiet)
        assert not (tmp_path / "run").exists()
        return
    said: list[str] = []
    summary = train(settings, said.append)
    assert summary["stopped"] == "interrupted"
    assert "interrupted  with 1 of 2 models" in said
    assert [member["seed"] for member in summary["members"]] == [1]
    assert len(load_classifier(tmp_path / "run").members) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train.only=head"], "^train.only=head needs a pretrained model: .*--from MODEL"),
        (["base=/nowhere"], r"/nowhere"),
        (["data.tokenizer=/nowhere"], r"^data.tokenizer must be"),
        (["head.pooling=first", "model.causal=true"], r"^pooling must be"),
        (["device=tpu"], r"^device"),
    ],
)
def test_wrong_settings_raise_before_anything_is_written(
    words: list[str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        train(config(tmp_path, *words), quiet)
    assert "\n" not in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == {"texts.csv"}


def test_more_layers_than_there_are(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"last:3"):
        train(config(tmp_path, f"base={base}", "train.only=last:3"), quiet)


def test_a_tokenizer_of_another_model(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "small"
    ffn.save(folder, Transformer(TransformerConfig(vocab_size=8, dim=8, num_layers=1, num_heads=1)))
    ByteTokenizer().save(folder / "tokenizer.json")
    with pytest.raises(ValueError, match=r"small: the tokenizer has 256 entries, the model 8"):
        train(config(tmp_path, f"base={folder}"), quiet)
