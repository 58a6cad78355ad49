"""A saved classifier predicts the same, a damaged folder gives one line, a new folder is whole or absent."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import ffn
from ffn.classify.batches import TextEncoder
from ffn.classify.objective import Objective
from ffn.classify.result import TextClassifier, check_new, load_classifier, new_folder, save_classifier
from ffn.gpt.transformer import Transformer, TransformerConfig
from ffn.nn.classifier import Classifier
from ffn.text.tokenizer import CharTokenizer

CONFIG = TransformerConfig(
    vocab_size=30, dim=8, num_layers=1, num_heads=2, hidden_dim=12, max_seq_len=16, causal=False, head="none"
)
TEXTS = ["a cat", "abc" * 10, "b"]


def text_classifier(members: int = 1, shared: bool = False, **options) -> TextClassifier:
    loss = options.pop("loss", "cross_entropy")
    objective = Objective(loss, () if loss == "mse" else ("no", "ja, später"))
    backbone, models = Transformer(CONFIG), []
    for _ in range(members):
        body = backbone if shared else Transformer(CONFIG)
        models.append(Classifier(body, objective.num_logits, **{"pooling": "mean", **options}).eval())
    encode = TextEncoder(CharTokenizer("abcdefgt \N{REPLACEMENT CHARACTER}"), 12, pad=3)
    return TextClassifier(models, objective, encode)


@pytest.mark.parametrize("members", [1, 3])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("loss", ["cross_entropy", "binary_cross_entropy", "mse"])
def test_a_saved_classifier_predicts_the_same(members: int, shared: bool, loss: str, tmp_path: Path) -> None:
    saved = text_classifier(members, shared, loss=loss, transform="tanh", dropout=0.25)
    save_classifier(tmp_path, saved)
    again = load_classifier(tmp_path)
    assert again.members[-1].head.dropout == 0.25, "an export needs it"
    assert torch.equal(again.predict(TEXTS), saved.predict(TEXTS))
    assert again.classes == saved.classes
    assert (again.encode.window, again.encode.pad) == (12, 3)
    backbones = len({id(member.backbone) for member in again.members})
    assert backbones == (1 if shared else members)
    assert len(list(tmp_path.rglob("model.safetensors"))) == backbones
    assert again.predict([]).shape == ((0,) if loss == "mse" else (0, 2))


def test_an_ensemble_is_the_mean_of_its_members() -> None:
    three = text_classifier(3)
    each = [
        TextClassifier([member], three.objective, three.encode).predict(TEXTS) for member in three.members
    ]
    torch.testing.assert_close(three.predict(TEXTS), sum(each) / 3)
    assert not torch.equal(each[0], each[1])
    torch.testing.assert_close(three.predict(TEXTS).sum(1), torch.ones(3, dtype=torch.float64))


def test_load_gives_the_backbone(tmp_path: Path) -> None:
    saved = text_classifier()
    save_classifier(tmp_path, saved)
    backbone = ffn.load(tmp_path)
    assert isinstance(backbone, Transformer)
    tokens = torch.tensor([saved.encode(["a cat"])[0][0]])
    assert torch.equal(backbone(tokens), saved.members[0].backbone.hidden(tokens))
    assert ffn.load_tokenizer(tmp_path).encode("cab") == saved.encode.tokenizer.encode("cab")


def test_the_origin_of_the_backbone_is_saved(tmp_path: Path) -> None:
    saved = text_classifier()
    saved.members[0].backbone.origin = {"model_type": "distilbert", "pad_token_id": 3}  # type: ignore
    save_classifier(tmp_path, saved)
    assert load_classifier(tmp_path).members[0].backbone.origin == {  # type: ignore
        "model_type": "distilbert", "pad_token_id": 3,
    }  # fmt: skip


def damage(folder: Path, what: str) -> None:
    facts = folder / "classifier.json"
    keys = json.loads(facts.read_text())
    match what:
        case "absent":
            facts.unlink()
        case "cut":
            facts.write_text(facts.read_text()[:40])
        case "head absent":
            (folder / "head.safetensors").unlink()
        case "head cut":
            file = folder / "head.safetensors"
            file.write_bytes(file.read_bytes()[:-3])
        case "model absent":
            (folder / "model.safetensors").unlink()
        case "tokenizer absent":
            (folder / "tokenizer.json").unlink()
        case "another tokenizer":
            CharTokenizer(map(chr, range(64, 164))).save(folder / "tokenizer.json")
        case _:
            key, value = what.split("=")
            facts.write_text(json.dumps({**keys, key: json.loads(value)}))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("absent", r"it has no classifier.json$"),
        ("cut", r"classifier.json: "),
        ("head absent", r"head.safetensors"),
        ("head cut", r"head.safetensors: "),
        ("model absent", r"model.safetensors"),
        ("tokenizer absent", r"tokenizer.json: "),
        ("another tokenizer", r"classifier.json, tokenizer.json and model.safetensors"),
        ("format=2", r"classifier.json: its format is 2"),
        ('classes=["a", "b", "c"]', r"head.safetensors: "),
        ("classes=[1, 2]", r"classifier.json: damaged: classes=\[1, 2\]$"),
        ('transform="tanh"', r"head.safetensors: "),
        ('transform="sin"', r"transform must be .*'sin'"),
        ('pooling="max"', r"pooling must be .*'max'"),
        ("bias=false", r"head.safetensors: "),
        ('loss="hinge"', r"classifier.json: damaged: loss='hinge'$"),
        ("window=0", r"classifier.json: damaged: window=0$"),
        ("window=99", r"classifier.json, tokenizer.json and model.safetensors"),
        ("members=0", r"classifier.json: damaged: members=0$"),
        ("members=2", r"member-2"),
        ("members=null", r"classifier.json: damaged: members=None$"),
    ],
)
def test_a_damaged_folder_gives_one_line(what: str, message: str, tmp_path: Path) -> None:
    save_classifier(tmp_path, text_classifier())
    damage(tmp_path, what)
    with pytest.raises(ValueError, match=message) as caught:
        load_classifier(tmp_path)
    assert "\n" not in str(caught.value)


def _write_half(path: Path) -> None:
    with new_folder(path) as folder:
        (folder / "a").write_text("half")
        raise OSError("the disk is full")


def test_a_new_folder_is_whole_or_absent(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "run"
    with pytest.raises(OSError, match="full"):
        _write_half(path)
    assert list(path.parent.iterdir()) == []
    left = path.with_name(".run.partial")  # of a killed process
    left.mkdir()
    (left / "old").write_text("")
    with new_folder(path) as folder:
        (folder / "a").write_text("whole")
        assert not path.exists()
    assert [file.name for file in path.iterdir()] == ["a"]
    assert list(path.parent.iterdir()) == [path]


def test_check_new_refuses_a_folder_that_is_not_empty(tmp_path: Path) -> None:
    check_new(tmp_path / "new")
    (tmp_path / "empty").mkdir()
    check_new(tmp_path / "empty")
    with new_folder(tmp_path / "empty") as folder:
        (folder / "a").write_text("x")
    for path in (tmp_path / "empty", tmp_path / "empty" / "a"):
        with pytest.raises(ValueError, match=r"^out=.* already exists"):
            check_new(path)
    shutil.rmtree(tmp_path / "empty")


def test_an_ensemble_cannot_be_exported(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"2 members$"):
        text_classifier(2).export(tmp_path / "out")
    assert not (tmp_path / "out").exists()
