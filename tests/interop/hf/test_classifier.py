"""Exported classifiers: transformers' Auto classes load them and give the same logits in float64."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from ffn.classify.batches import TextEncoder
from ffn.classify.objective import Objective
from ffn.classify.result import TextClassifier
from ffn.gpt.transformer import Transformer, TransformerConfig
from ffn.interop.hf.classifier import save_classifier_folder
from ffn.interop.hf.folder import load_folder
from ffn.nn.classifier import Classifier
from ffn.text.tokenizer import ByteTokenizer

tiny = pytest.importorskip("tests.interop.hf.tiny")
transformers = pytest.importorskip("transformers")

FIRST = {"pooling": "first"}
HEADS: dict[str, dict[str, str]] = {
    "bert-bare": {**FIRST, "transform": "tanh"},
    "roberta-bare": {**FIRST, "transform": "tanh"},
    "distilbert-bare": {**FIRST, "transform": "relu"},
}
DECODERS = ("llama", "mistral", "qwen2-full", "qwen3", "phi3", "gemma", "gemma2", "olmo2", "smollm3", "gpt2",
            "gpt_neox")  # fmt: skip
HEADS |= {name: {"pooling": "last"} for name in DECODERS}
LABELS = ("no", "yes", "vielleicht")


def build(name: str, folder: Path, **options) -> Classifier:
    """A Classifier on a backbone loaded from transformers."""
    tiny.build_theirs(name).save_pretrained(folder)
    backbone = load_folder(folder)
    backbone.head, backbone.config = None, dataclasses.replace(backbone.config, head="none")
    model = Classifier(backbone, 3, **{**HEADS[name], "dropout": 0.25, **options}).eval()
    return tiny.randomize(model)


@pytest.mark.parametrize("name", HEADS)
def test_transformers_gives_the_same_logits(name: str, tmp_path: Path) -> None:
    model = build(name, tmp_path / "theirs")
    save_classifier_folder(tmp_path / "out", model, LABELS, pad_token_id=0)
    implementation = "eager" if name == "gemma2" else "sdpa"
    theirs, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "out", output_loading_info=True, attn_implementation=implementation
    )
    for module in theirs.modules():  # Gemma's embedding: ours has the scale of a float32 model of theirs
        if hasattr(module, "scalar_embed_scale"):
            module.embed_scale = torch.tensor(module.scalar_embed_scale)
    missing, unexpected = info["missing_keys"], info["unexpected_keys"]
    assert not missing, "every weight of transformers was in the file"
    assert not unexpected, "and no other tensor"
    assert theirs.dtype == torch.float64
    assert theirs.config.id2label == dict(enumerate(LABELS))
    pad = theirs.config.pad_token_id
    tokens = torch.randint(3, tiny.VOCAB, (3, 9))
    mask = torch.ones_like(tokens)
    mask[1, 6:] = mask[2, 1:] = 0
    tokens[mask == 0] = pad
    with torch.no_grad():
        expected = model(tokens, attention_mask=mask)
    found = tiny.output_of(theirs.eval(), tokens, attention_mask=mask)
    assert found.shape == (3, 3)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def decoder_of(tokenizer, **origin) -> TextClassifier:
    """A Llama with last-token pooling, in float64."""
    config = TransformerConfig(
        vocab_size=256, dim=16, num_layers=1, num_heads=2, hidden_dim=24, max_seq_len=32, head="none"
    )
    backbone = Transformer(config, dtype=torch.float64)
    backbone.origin = {"model_type": "llama", **origin} if origin else None
    model = tiny.randomize(Classifier(backbone, 2, "last").eval())
    return TextClassifier([model], Objective("cross_entropy", ("a", "b")), TextEncoder(tokenizer, 32))


@pytest.mark.parametrize(("origin", "pad"), [({}, None), ({"eos_token_id": 255}, 255)])
def test_no_text_ends_with_the_padding_of_a_decoder(
    origin: dict[str, int], pad: int | None, tmp_path: Path
) -> None:
    """transformers finds the last token by its padding; as a byte, 0 is a token like any other."""
    ours = decoder_of(ByteTokenizer(), **origin)
    ours.export(tmp_path / "out")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert theirs.config.pad_token_id == pad
    texts = ["good\0", "bad", "a\0\0"]
    rows = ours.encode(texts)[0]
    with torch.no_grad():
        found = torch.cat([theirs(torch.tensor([row])).logits for row in rows]).softmax(-1)
    torch.testing.assert_close(found, ours.predict(texts), rtol=0, atol=1e-6)  # their norms: float32
    if pad is not None:
        tokens = torch.tensor([[*row, *[pad] * (5 - len(row))] for row in rows])
        with torch.no_grad():
            found = theirs(tokens, attention_mask=tokens != pad).logits.softmax(-1)
        torch.testing.assert_close(found, ours.predict(texts), rtol=0, atol=1e-6)  # their norms: float32


def test_padding_that_ends_each_text_raises(tmp_path: Path) -> None:
    ours = decoder_of(ByteTokenizer(), pad_token_id=7, eos_token_id=7)
    ours.encode.suffix = [7]
    with pytest.raises(ValueError, match=r"^token 7 "):
        ours.export(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    ours.members[0].backbone.origin.pop("pad_token_id")  # type: ignore[attr-defined]
    ours.export(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["pad_token_id"] is None


def test_dropout_and_problem_type_are_written(tmp_path: Path) -> None:
    model = build("distilbert-bare", tmp_path / "theirs")
    save_classifier_folder(tmp_path / "out", model, LABELS, "regression")
    keys = json.loads((tmp_path / "out" / "config.json").read_text())
    assert keys["seq_classif_dropout"] == 0.25
    assert keys["problem_type"] == "regression"
    assert keys["architectures"] == ["DistilBertForSequenceClassification"]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("bert-bare", {"pooling": "mean"}, r"^bert: .* pooling='first', "),
        ("bert-bare", {"transform": None}, r"this one has pooling='first', transform=None, bias=True$"),
        ("roberta-bare", {"transform": "relu"}, r"^roberta: .* transform='tanh', bias=True, this one has"),
        ("gpt2", {"bias": True}, r"^gpt2: .* transform=None, bias=False, this one has .* bias=True$"),
        ("llama", {"pooling": "mean"}, r"^llama: .* pooling='last'"),
    ],
)
def test_a_head_that_transformers_lacks_raises_one_line(
    name: str, options: dict, message: str, tmp_path: Path
) -> None:
    model = build(name, tmp_path / "theirs", **options)
    with pytest.raises(ValueError, match=message) as caught:
        save_classifier_folder(tmp_path / "out", model, LABELS)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_the_architecture_from_scratch_follows_from_the_config(tmp_path: Path) -> None:
    config = TransformerConfig(
        vocab_size=256, dim=16, num_layers=1, num_heads=2, hidden_dim=24, max_seq_len=32, causal=False,
        head="none", norm="layernorm", norm_position="post", activation="gelu", bias=True, norm_eps=1e-12,
        attention_bias=True, position="learned", embedding_norm=True, num_token_types=1,
    )  # fmt: skip
    backbone = Transformer(config, dtype=torch.float64)
    models = [Classifier(backbone, n, "first", "tanh").eval() for n in (2, 1, 1)]
    losses = ("cross_entropy", "binary_cross_entropy", "mse")
    for model, loss in zip(models, losses, strict=True):
        objective = Objective(loss, () if loss == "mse" else ("a", "b"))  # type: ignore[arg-type]
        ours = TextClassifier([model], objective, TextEncoder(ByteTokenizer(), 32))
        ours.export(tmp_path / loss)
        theirs = transformers.BertForSequenceClassification.from_pretrained(tmp_path / loss)
        tokens = torch.randint(256, (2, 7))
        with torch.no_grad():
            torch.testing.assert_close(theirs(tokens).logits, model(tokens), rtol=1e-10, atol=1e-10)
    kinds = ["single_label_classification", "multi_label_classification", "regression"]
    configs = [json.loads((tmp_path / loss / "config.json").read_text()) for loss in losses]
    assert [keys["problem_type"] for keys in configs] == kinds
    assert [keys["id2label"] for keys in configs] == [{"0": "a", "1": "b"}, {"0": "b"}, {"0": "value"}]
