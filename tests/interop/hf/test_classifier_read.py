"""Classifiers that transformers wrote give the same logits in float64; exported ones are read back."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import ffn
from ffn.classify.batches import TextEncoder
from ffn.classify.objective import Objective
from ffn.classify.result import TextClassifier, load_classifier
from ffn.files.shards import open_shards, write_tensors
from ffn.gpt.transformer import Transformer, TransformerConfig
from ffn.interop.hf.classifier import load_classifier_folder
from ffn.nn.classifier import Classifier
from ffn.text.tokenizer import ByteTokenizer
from tests.interop.hf.test_classifier import HEADS

tiny = pytest.importorskip("tests.interop.hf.tiny")
transformers = pytest.importorskip("transformers")

CLASSES = ("no", "yes", "vielleicht")


def written(folder: Path, name: str = "bert-bare", **options: Any) -> Any:
    """Save and return a classifier of transformers in float64, of three classes by default."""
    config = tiny.build_theirs(name).config
    named = {} if "num_labels" in options else {"id2label": dict(enumerate(CLASSES))}
    for key, value in ({"pad_token_id": 0} | named | options).items():
        setattr(config, key, value)
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    model = tiny.randomize(model).double().eval()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("name", HEADS)
def test_the_logits_equal_those_of_transformers(name: str, tmp_path: Path) -> None:
    theirs = written(tmp_path, name)
    ours, labels, kind = load_classifier_folder(tmp_path)
    assert (labels, kind) == (CLASSES, "single_label_classification")
    assert not ours.training
    tokens, mask = torch.randint(3, tiny.VOCAB, (3, 9)), torch.ones(3, 9, dtype=torch.int64)
    mask[1, 6:] = mask[2, 1:] = 0
    tokens[mask == 0] = 0
    expected = tiny.output_of(theirs, tokens, attention_mask=mask)
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens, attention_mask=mask), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "name", ["bert-bare", "roberta-bare", "distilbert-bare", "llama", "gpt2", "gpt_neox"]
)
def test_load_returns_the_backbone_without_a_head(name: str, tmp_path: Path) -> None:
    theirs = written(tmp_path, name)
    backbone = ffn.load(tmp_path)
    assert backbone.config.head == "none"
    tokens = torch.randint(3, tiny.VOCAB, (2, 7))
    expected = tiny.output_of(theirs.base_model, tokens)
    with torch.no_grad():
        torch.testing.assert_close(backbone.hidden(tokens), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("name", "said", "dropout"),
    [
        ("bert-bare", {"classifier_dropout": 0.3}, 0.3),
        ("bert-bare", {"classifier_dropout": None, "hidden_dropout_prob": 0.2}, 0.2),
        ("distilbert-bare", {"seq_classif_dropout": 0.4}, 0.4),
        ("llama", {}, 0.0),
    ],
)
def test_the_dropout_is_that_of_transformers(name: str, said: dict, dropout: float, tmp_path: Path) -> None:
    theirs = written(tmp_path, name, **said)
    assert getattr(getattr(theirs, "dropout", None), "p", 0.0) == dropout
    assert load_classifier_folder(tmp_path)[0].head.dropout == dropout


BERT = TransformerConfig(
    vocab_size=256, dim=16, num_layers=1, num_heads=2, hidden_dim=24, max_seq_len=32, causal=False,
    head="none", norm="layernorm", norm_position="post", activation="gelu", bias=True, norm_eps=1e-12,
    attention_bias=True, position="learned", embedding_norm=True, num_token_types=1,
)  # fmt: skip


@pytest.mark.parametrize(
    ("objective", "classes"),
    [
        (Objective("cross_entropy", ("a", "b", "c")), ("a", "b", "c")),
        (Objective("binary_cross_entropy", ("a", "b")), ("not b", "b")),  # theirs has no name for the other
        (Objective("mse"), ()),
    ],
)
def test_an_exported_classifier_predicts_the_same(
    objective: Objective, classes: tuple, tmp_path: Path
) -> None:
    backbone = Transformer(BERT, dtype=torch.float64)
    model = tiny.randomize(Classifier(backbone, objective.num_logits, "first", "tanh", 0.25)).eval()
    ours = TextClassifier([model], objective, TextEncoder(ByteTokenizer(), 32))
    ours.export(tmp_path / "out")
    ByteTokenizer().save(tmp_path / "out" / "tokenizer.json")  # theirs knows no bytes, so none was written
    again = load_classifier(tmp_path / "out")
    assert again.classes == classes
    assert again.members[0].head.dropout == 0.25
    texts = ["one text", "another, longer", "é"]
    torch.testing.assert_close(again.predict(texts), ours.predict(texts), rtol=1e-12, atol=1e-12)


def change(folder: Path, **keys: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"architectures": ["BertModel"]}, r"architectures must be .*BertForSequenceClassification"),
        ({"architectures": ["BertForTokenClassification"]}, r"architectures"),
        ({"id2label": {"0": "a", "1": "b"}}, r"classifier\.weight .*\(2, 15\) .* got \(3, 15\)"),
        ({"id2label": {"0": "a", "2": "b"}}, r"id2label must have the keys"),
        ({"id2label": ["a", "b", "c"]}, r"id2label must have the keys"),
        ({"id2label": {"0": "a", "1": "a", "2": "b"}}, r"id2label must hold different names"),
        ({"id2label": {}}, r"id2label must hold different names"),
        ({"id2label": {"0": 1}}, r"id2label must hold different names"),
        ({"id2label": None, "num_labels": 10**15}, r"num_labels must be"),
        ({"classifier_dropout": "much"}, r"classifier_dropout must be"),
        ({"classifier_dropout": 2}, r"dropout"),
        ({"problem_type": "multi_label_classification"}, r"problem_type='multi_label_.* with 3 labels"),
        ({"problem_type": ["regression"]}, r"problem_type=\['regression'\] with 3 labels"),
        ({"pad_token_id": "x"}, r"pad_token_id"),
        ({"pad_token_id": True}, r"pad_token_id"),
        ({"pad_token_id": [0]}, r"pad_token_id"),
    ],
)
def test_a_wrong_config_raises_one_line(keys: dict, message: str, tmp_path: Path) -> None:
    written(tmp_path)
    change(tmp_path, **keys)
    with pytest.raises(ValueError, match=message) as caught:
        load_classifier(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_missing_head_raises(tmp_path: Path) -> None:
    model = written(tmp_path)
    model.bert.save_pretrained(tmp_path)
    change(tmp_path, architectures=["BertForSequenceClassification"], id2label=dict(enumerate(CLASSES)))
    with pytest.raises(ValueError, match=r"must have the shape .* got no tensor"):
        load_classifier_folder(tmp_path)


def test_a_head_of_integers_raises(tmp_path: Path) -> None:
    written(tmp_path)
    state = dict(open_shards(tmp_path))
    state["classifier.weight"] = state["classifier.weight"].to(torch.int8)
    write_tensors(tmp_path / "model.safetensors", state, {"format": "pt"})
    with pytest.raises(ValueError, match=r"classifier\.weight must be of floats"):
        load_classifier_folder(tmp_path)


def save_framed(folder: Path) -> None:
    """Save a tokenizer.json that puts token 1 before and token 2 after a text."""
    tokenizers = pytest.importorskip("tokenizers")
    words = {word: number for number, word in enumerate(("<pad>", "<s>", "</s>", "<unk>", *"abcdefgh"))}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    made.add_special_tokens(["<pad>", "<s>", "</s>", "<unk>"])
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    made.save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("pad", [0, 2, None])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert-bare"])
def test_texts_that_end_with_the_padding_predict_as_in_transformers(
    name: str, pad: int | None, tmp_path: Path
) -> None:
    theirs = written(tmp_path, name, pad_token_id=pad)
    save_framed(tmp_path)
    texts = ["a b c", "d", "e f g h a b", "c " * 100]
    fast = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    rows = [fast(text, truncation=True, max_length=tiny.WINDOW)["input_ids"] for text in texts]
    assert all(row[-1] == 2 for row in rows)
    expected = torch.cat([tiny.output_of(theirs, torch.tensor([row])) for row in rows]).softmax(-1)
    torch.testing.assert_close(load_classifier(tmp_path).predict(texts), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("pad", [-1, tiny.VOCAB])
def test_padding_outside_the_vocabulary_is_ignored(pad: int, tmp_path: Path) -> None:
    written(tmp_path, "llama")
    save_framed(tmp_path)
    texts = ["a b c", "d"]
    expected = load_classifier(tmp_path).predict(texts)
    change(tmp_path, pad_token_id=pad)
    torch.testing.assert_close(load_classifier(tmp_path).predict(texts), expected, rtol=0, atol=0)
    assert "pad_token_id" not in ffn.load(tmp_path).origin


def test_unnamed_labels_are_numbered(tmp_path: Path) -> None:
    written(tmp_path, "llama", num_labels=4)
    change(tmp_path, id2label=None, label2id=None, num_labels=4)
    assert load_classifier_folder(tmp_path)[1:] == (
        ("LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3"), "single_label_classification",
    )  # fmt: skip
