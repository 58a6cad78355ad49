"""A Classifier as one of transformers' sequence-classification models, where it has that form: equal scores.

model_type     what it does with the final hidden states
bert           classifier(tanh(bert.pooler.dense(first token)))
roberta        classifier.out_proj(tanh(classifier.dense(first token)))
distilbert     classifier(relu(pre_classifier(first token)))
decoders       score(last token), without a bias
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ffn.interop.hf.config import FAMILIES, write_config
from ffn.interop.hf.folder import CONFIG, TOKENIZER, TOKENS, fitting_architecture
from ffn.interop.hf.names import TABLES
from ffn.interop.hf.tables import Weight, weights
from ffn.interop.shards import write_shards
from ffn.nn.classifier import Classifier
from ffn.tokenizer import HFTokenizer
from ffn.transformer import Transformer

TOKENIZER_CONFIG = "tokenizer_config.json"


class Form(NamedTuple):
    """Where the parts of our head lie, what they have to be, and the key of their dropout."""

    out_proj: str
    dense: str | None
    pooling: str
    transform: str | None
    dropout: str


_DECODER = Form("score", None, "last", None, "classifier_dropout")
FORMS = {
    "bert": Form("classifier", "bert.pooler.dense", "first", "tanh", "classifier_dropout"),
    "roberta": Form("classifier.out_proj", "classifier.dense", "first", "tanh", "classifier_dropout"),
    "distilbert": Form("classifier", "pre_classifier", "first", "relu", "seq_classif_dropout"),
}


def save_classifier_folder(
    path: str | Path,
    model: Classifier,
    labels: Sequence[str],
    problem_type: str = "single_label_classification",
    *,
    architecture: str | None = None,
    pad_token_id: int | None = None,
    tokenizer: HFTokenizer | None = None,
) -> None:
    """Write a folder that transformers' AutoModelForSequenceClassification reads.

    Args:
        labels: the name of each score. problem_type: as transformers calls it.
        architecture: transformers' model_type; left out, that of the backbone's origin, else the first that
            can say what its config says.
        pad_token_id: of batches, where the backbone says none; a decoder finds each text's last token by it,
            so that no text may end with it.
        tokenizer: written beside the model, so that AutoTokenizer frames and cuts a text as it does.

    Raises:
        ValueError: the model has no such form there; one line says what it would be. OSError leaves what was
            there.
    """
    backbone = model.backbone
    assert isinstance(backbone, Transformer)
    config = dataclasses.replace(backbone.config, head="none")
    origin: dict[str, Any] = backbone.origin or {}
    if architecture is None:
        architecture = str(origin["model_type"]) if origin else fitting_architecture(config)
    keys = write_config(config, architecture)
    form = FORMS.get(architecture, _DECODER)
    _check_form(model, architecture, form)
    keys |= {key: origin.get(key) for key in TOKENS if keys.get(key) is None}
    if keys.get("pad_token_id") is None:
        keys["pad_token_id"] = pad_token_id
    keys |= {
        "architectures": [FAMILIES[architecture].classes["none"].removesuffix("Model") + _CLASS],
        "id2label": {str(number): name for number, name in enumerate(labels)},
        "label2id": {name: number for number, name in enumerate(labels)},
        "problem_type": problem_type,
        form.dropout: model.head.dropout,
        "dtype": str(model.head.out_proj.weight.dtype).removeprefix("torch."),
    }
    texts = {CONFIG: json.dumps(keys, indent=2, sort_keys=True) + "\n"}
    if tokenizer is not None:
        texts[TOKENIZER] = tokenizer.specification
        texts[TOKENIZER_CONFIG] = _tokenizer_config(tokenizer, config.max_seq_len, keys["pad_token_id"])
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = _head_tensors(model, form)
    ours, parts = backbone.state_dict(), _parts(config, architecture)
    sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
    for name, rows in parts.items():
        sizes[name] = torch.Size(rows[0][1].shape).numel() * ours[rows[0][0]].element_size()

    def read(name: str) -> Tensor:
        if name in tensors:
            return tensors[name]
        rows = parts[name]
        tensor = torch.zeros(rows[0][1].shape, dtype=ours[rows[0][0]].dtype)
        for our_name, row in rows:
            row.store(tensor, ours[our_name])
        return tensor

    write_shards(folder, sizes, read, texts)


_CLASS = "ForSequenceClassification"


def _tokenizer_config(tokenizer: HFTokenizer, window: int, pad: int | None) -> str:
    """By it AutoTokenizer takes tokenizer.json as it stands, and adds no tokens that the model_type knows."""
    keys: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": window,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    if pad is not None:
        keys["pad_token"] = tokenizer.spelling(pad)
    return json.dumps(keys, indent=2, sort_keys=True) + "\n"


def _parts(config: Any, architecture: str) -> dict[str, list[tuple[str, Weight]]]:
    """Their name of each tensor of the backbone -> our names within it."""
    found: dict[str, list[tuple[str, Weight]]] = {}
    for name, row in weights(config, architecture).items():
        found.setdefault(TABLES[architecture].prefix + row.name, []).append((name, row))
    return found


def _head_tensors(model: Classifier, form: Form) -> dict[str, Tensor]:
    names = {"out_proj": form.out_proj, "dense": form.dense}
    found = {}
    for name, tensor in model.head.state_dict().items():
        part, _, kind = name.partition(".")
        found[f"{names[part]}.{kind}"] = tensor
    return found


def _check_form(model: Classifier, architecture: str, form: Form) -> None:
    bias = form.dense is not None
    wanted = f"pooling={form.pooling!r}, transform={form.transform!r}, bias={bias}"
    head = model.head
    has_bias = head.out_proj.bias is not None
    got = f"pooling={model.pooling!r}, transform={head.transform!r}, bias={has_bias}"
    if got != wanted:
        raise ValueError(f"{architecture}: its classifier in transformers has {wanted}; this one has {got}")
