"""Whole trainings, from scratch and from pretrained models: what is left behind, and that it is true."""

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


def test_a_whole_training(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    said: list[str] = []
    words = ["data.tokenizer=word", "fit.epochs=6", "fit.lr=2e-2"]
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
    assert order == sorted(order), "mistakes first, the worst before all"
    assert isinstance(ffn.load(run), Transformer)
    assert read_config(run / "config.toml").model.vocab_size == classifier.encode.tokenizer.vocab_size
    with pytest.raises(ValueError, match=r"^out=.*run: there is something already"):
        train(config(tmp_path), quiet)


def test_the_same_configuration_gives_the_same_folder(tmp_path: Path) -> None:
    train(config(tmp_path, "fit.word_dropout=0.2", "model.dropout=0.1"), quiet)
    train(config(tmp_path, "fit.word_dropout=0.2", "model.dropout=0.1", f"out={tmp_path / 'other'}"), quiet)
    for name in ("model.safetensors", "head.safetensors", "predictions.csv"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()


@pytest.mark.parametrize("what", ["head", "ffn", "last:1", "all", "lora"])
def test_from_a_pretrained_model(what: str, base: Path, tmp_path: Path) -> None:
    words = [f"base={base}", f"train={what}", "fit.epochs=2", "fit.lr=1e-2", "fit.metric=loss"]
    said: list[str] = []
    summary = train(config(tmp_path, *words, "adapter.rank=2", "fit.patience=0"), said.append)
    before, after = ffn.load(base).state_dict(), ffn.load(tmp_path / "run").state_dict()
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    inside = ["blocks.0.feed_forward.", "blocks.1.feed_forward."]
    blocks = {
        "head": [], "ffn": inside, "last:1": ["blocks.1.", "norm."], "all": [""], "lora": inside,
    }[what]  # fmt: skip
    assert changed == {name for name in after if any(name.startswith(block) for block in blocks)}
    assert set(after) == set(before), "adapters are merged, and the decoder's tied head has no weights"
    assert any(line.startswith("cached ") for line in said) == (what == "head")
    assert (summary["cache_seconds"] is not None) == (what == "head")
    assert any("task head" in line for line in said)
    total = sum(p.numel() for p in after.values()) + 3 * 16  # the last token is read, without a bias
    assert summary["parameters"] == total
    assert (summary["trained_parameters"] == total) == (what == "all")


def test_a_base_keeps_its_shape_and_may_drop_otherwise(base: Path, tmp_path: Path) -> None:
    train(config(tmp_path, f"base={base}", "model.dropout=0.25", "fit.epochs=1"), quiet)
    expected = dataclasses.replace(PRETRAINED, head="none", dropout=0.25)
    assert ffn.load(tmp_path / "run").config == expected
    written = (tmp_path / "run" / "config.toml").read_text()
    assert from_toml(ClassifyConfig, written).model == expected
    for word, message in (
        ("model.num_layers=3", r"model\.num_layers must be 2, got 3"),
        ("data.tokenizer=char", r"^data\.tokenizer must be .*, got char"),
    ):
        with pytest.raises(ValueError, match=message):
            train(config(tmp_path, f"base={base}", word, f"out={tmp_path / 'other'}"), quiet)
    bare = tmp_path / "bare"
    ffn.save(bare, Transformer(PRETRAINED))
    with pytest.raises(ValueError, match=r"^data\.tokenizer must be .*bare"):
        train(config(tmp_path, f"base={bare}", f"out={tmp_path / 'other'}"), quiet)
    words = [f"base={bare}", f"data.tokenizer={base / 'tokenizer.json'}", "fit.epochs=1"]
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
    words = [f"base={tmp_path / 'adapted'}", f"data.tokenizer={base / 'tokenizer.json'}", f"train={what}"]
    train(config(tmp_path, *words, "fit.epochs=1", "fit.lr=0"), quiet)
    found, tokens = ffn.load(tmp_path / "run"), torch.arange(20)[None]
    assert set(found.state_dict()) == set(ffn.load(base).state_dict())
    torch.testing.assert_close(found.hidden(tokens), model.eval().hidden(tokens))


def test_the_cache_changes_nothing_but_the_time(base: Path, tmp_path: Path) -> None:
    write_table(tmp_path / "texts.csv", [(text.ljust(60), name) for text, name in texts(90)])
    for out, cache in (("run", "true"), ("slow", "false")):
        words = [f"base={base}", "train=head", f"fit.cache={cache}", f"out={tmp_path / out}"]
        train(config(tmp_path, *words), quiet)
    heads = [(tmp_path / out / "head.safetensors").read_bytes() for out in ("run", "slow")]
    assert heads[0] == heads[1]


def test_what_keeps_features_from_the_cache_is_said(base: Path, tmp_path: Path) -> None:
    said: list[str] = []
    words = [f"base={base}", "train=head", "fit.epochs=1", "fit.word_dropout=0.1"]
    assert train(config(tmp_path, *words), said.append)["cache_seconds"] is None
    assert "not cached   fit.word_dropout makes the features others in each epoch" in said


def test_an_ensemble_of_seeds(tmp_path: Path) -> None:
    words = ["fit.seeds=[1, 2, 3]", "fit.epochs=2", "fit.metric=loss"]
    summary = train(config(tmp_path, *words), quiet)
    assert [member["seed"] for member in summary["members"]] == [1, 2, 3]
    together = load_classifier(tmp_path / "run")
    assert len(together.members) == 3
    each = []
    for seed in (1, 2, 3):
        train(config(tmp_path, *words[1:], f"fit.seeds=[{seed}]", f"out={tmp_path / str(seed)}"), quiet)
        each.append(load_classifier(tmp_path / str(seed)).predict(["bread and soup", "a wave"]))
    torch.testing.assert_close(together.predict(["bread and soup", "a wave"]), sum(each) / 3)
    assert not torch.allclose(each[0], each[1])
    rows = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["seed", "1", "1", "2", "2", "3", "3"]


def test_numbers_are_predicted_in_their_own_units(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    rows = [(text, 1000.0 + 100.0 * (name == "food")) for text, name in texts(120)]
    write_table(tmp_path / "texts.csv", rows)
    summary = train(
        config(tmp_path, "data.tokenizer=word", "fit.loss=mse", "fit.epochs=6", "fit.lr=2e-2"), quiet
    )
    assert summary["test"]["mse"] < 2500.0, "better than the mean"
    assert summary["val"].keys() >= {"mse", "r2"}
    values = load_classifier(tmp_path / "run").predict(["some bread", "a drum"])
    assert values[0] > 1050.0 > values[1]
    assert not (tmp_path / "run" / "confusion.png").exists()


def test_two_classes_by_one_score(tmp_path: Path) -> None:
    words = ["fit.loss=binary_cross_entropy", "fit.class_weights=balanced", "fit.metric=roc_auc"]
    summary = train(config(tmp_path, *words, classes=2), quiet)
    classifier = load_classifier(tmp_path / "run")
    assert classifier.members[0].num_classes == 1
    assert classifier.predict(["bread"]).shape == (1, 2)
    assert "roc_auc" in summary["test"]


def test_a_decoder_from_scratch_reads_its_last_token(tmp_path: Path) -> None:
    words = ["model.causal=true", "model.position=rotary", "fit.epochs=1", "data.tokenizer=byte"]
    train(config(tmp_path, *words), quiet)
    facts = json.loads((tmp_path / "run" / "classifier.json").read_text())
    assert (facts["pooling"], facts["bias"], facts["classes"]) == ("last", False, ["food", "music", "sea"])


def test_padding_may_be_token_0() -> None:
    from ffn.classify.train import _pad

    learned = {"position": "learned", "position_offset": 1, "causal": False, "pad_token_id": 0}
    model = Transformer(dataclasses.replace(PRETRAINED, **learned), device="meta")
    model.origin = {"pad_token_id": 3}
    assert _pad(model) == 0


def test_it_goes_on_from_a_classifier(tmp_path: Path) -> None:
    train(config(tmp_path, "fit.epochs=1"), quiet)
    words = [f"base={tmp_path / 'run'}", "train=head", f"out={tmp_path / 'next'}"]
    train(config(tmp_path, *words, "fit.epochs=1"), quiet)
    assert ffn.load(tmp_path / "next").config == ffn.load(tmp_path / "run").config


@pytest.mark.parametrize("done", [0, 1])
def test_ctrl_c_loses_no_member_that_is_done(
    done: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ffn.classify import loop

    epochs, run_epoch = 0, loop._Loop.epoch

    def interrupted(self, epoch: int) -> float:
        nonlocal epochs
        if epochs == 2 * done:
            raise KeyboardInterrupt
        epochs += 1
        return run_epoch(self, epoch)

    monkeypatch.setattr(loop._Loop, "epoch", interrupted)
    settings = config(tmp_path, "fit.seeds=[1, 2]", "fit.epochs=2")
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
        (["train=head"], r"^train=head: wants a pretrained model, base=PATH; or train=all$"),
        (["train=some"], r"^'some' is no choice of what trains; want head, ffn, last:K, lora or all"),
        (["base=/nowhere"], r"^/nowhere: "),
        (["data.tokenizer=/nowhere"], r"^data.tokenizer=/nowhere: want word, bpe, char, byte"),
        (["head.pooling=first", "model.causal=true"], r"^pooling='first': a decoder's first token"),
        (["device=tpu"], r"^device must be .* got tpu$"),
    ],
)
def test_what_will_not_do_is_said_before_anything_is_written(
    words: list[str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        train(config(tmp_path, *words), quiet)
    assert "\n" not in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == {"texts.csv"}


def test_more_layers_than_there_are(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^last:3: the model has 2 layers"):
        train(config(tmp_path, f"base={base}", "train=last:3"), quiet)


def test_a_tokenizer_of_another_model(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "small"
    ffn.save(folder, Transformer(TransformerConfig(vocab_size=8, dim=8, num_layers=1, num_heads=1)))
    ByteTokenizer().save(folder / "tokenizer.json")
    with pytest.raises(ValueError, match=r"small: the tokenizer has 256 entries, the model 8; they do not"):
        train(config(tmp_path, f"base={folder}"), quiet)
