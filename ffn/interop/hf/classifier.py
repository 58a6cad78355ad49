"""Convert a Classifier to a sequence-classification model of transformers and back, with equal logits.

model_type     logits from the final hidden states
bert           classifier(tanh(bert.pooler.dense(first token)))
roberta        classifier.out_proj(tanh(classifier.dense(first token)))
distilbert     classifier(relu(pre_classifier(first token)))
decoders       score(last token), no bias
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ffn.files.shards import open_shards, read_json, write_shards
from ffn.files.strict_json import short
from ffn.gpt.transformer import Transformer
from ffn.interop.hf.config import FAMILIES, write_config
from ffn.interop.hf.folder import CONFIG, TOKENIZER, TOKENS, fitting_architecture, load_folder
from ffn.interop.hf.names import TABLES
from ffn.interop.hf.tables import Weight, weights
from ffn.nn.classifier import Classifier, Pooling, Transform
from ffn.text.tokenizer import HFTokenizer

TOKENIZER_CONFIG = "tokenizer_config.json"
MAX_LABELS = 100_000


class Form(NamedTuple):
    """The head of a model_type: names of its weights, its pooling and transform, its dropout key."""

    out_proj: str
    dense: str | None
    pooling: Pooling
    transform: Transform | None
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
        labels: the name of each logit.
        problem_type: transformers' name of the problem.
        architecture: transformers' model_type; by default that of the backbone's origin, else the first
            that can express its config.
        pad_token_id: padding of batches, if the backbone has none. A decoder finds the last token of a text
            by it, so no text may end with it.
        tokenizer: written beside the model, so that AutoTokenizer encodes texts as it does.

    Raises:
        ValueError: transformers has no such model.
        OSError: writing failed; existing files are kept.
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
        "architectures": [FAMILIES[architecture].sequence_class],
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
    head, parts = _head_tensors(model, form), _parts(config, architecture)
    _write(folder, backbone.state_dict(), parts, head, texts)


def _write(
    folder: Path,
    ours: Mapping[str, Tensor],
    parts: Mapping[str, list[tuple[str, Weight]]],
    head: Mapping[str, Tensor],
    texts: Mapping[str, str],
) -> None:
    """Write the tensors of the head and of the backbone; the latter are assembled from `ours` one by one."""
    sizes = {name: tensor.nbytes for name, tensor in head.items()}
    for name, rows in parts.items():
        sizes[name] = torch.Size(rows[0][1].shape).numel() * ours[rows[0][0]].element_size()

    def read(name: str) -> Tensor:
        if name in head:
            return head[name]
        rows = parts[name]
        tensor = torch.zeros(rows[0][1].shape, dtype=ours[rows[0][0]].dtype)
        for our_name, row in rows:
            row.store(tensor, ours[our_name])
        return tensor

    write_shards(folder, sizes, read, texts)


def load_classifier_folder(
    path: str | Path, device: str | torch.device = "cpu"
) -> tuple[Classifier, tuple[str, ...], str]:
    """Load (model in eval mode, name of each logit, problem_type) from a folder that transformers wrote.

    Raises:
        ValueError: as `load_folder`; another kind of model; a head of other weights.
    """
    folder = Path(path)
    keys = read_json(folder / CONFIG)
    backbone = load_folder(folder, device)
    architecture = str(keys["model_type"])
    form, wanted = FORMS.get(architecture, _DECODER), FAMILIES[architecture].sequence_class
    if keys.get("architectures") != [wanted]:
        raise ValueError(
            f"{folder}: {CONFIG}: architectures must be [{wanted}], got {short(keys.get('architectures'))}"
        )
    try:
        labels, kind = _labels(keys)
        bias = form.dense is not None
        model = Classifier(
            backbone, len(labels), form.pooling, form.transform, _dropout(keys, form), bias=bias
        )
    except ValueError as error:
        raise ValueError(f"{folder}: {CONFIG}: {error}") from None
    shards, state = open_shards(folder), model.head.state_dict()
    names = {ours: _their_name(ours, form) for ours in state}
    for ours, theirs in names.items():
        shape, spec = tuple(state[ours].shape), shards.specs.get(theirs)
        if spec is None or spec.shape != shape:
            got = spec.shape if spec else "no tensor"
            raise ValueError(f"{folder}: {theirs} must have the shape {shape} by {CONFIG}, got {got}")
        if not spec.dtype.is_floating_point:
            raise ValueError(f"{folder}: {theirs} must be of floats, got {spec.dtype}")
    model.head.load_state_dict({ours: shards[theirs] for ours, theirs in names.items()})
    return model.eval(), labels, kind


def _labels(keys: Mapping[str, Any]) -> tuple[tuple[str, ...], str]:
    """Return the names of the logits and the problem_type, by default the one transformers infers."""
    named = keys.get("id2label")
    if named is None:
        count = keys.get("num_labels", 2)
        if not isinstance(count, int) or not 0 < count <= MAX_LABELS:
            raise ValueError(f"num_labels must be in 1 .. {MAX_LABELS:,}, got {short(count)}")
        named = {str(number): f"LABEL_{number}" for number in range(count)}
    elif not isinstance(named, dict) or named.keys() != {str(number) for number in range(len(named))}:
        raise ValueError(f"id2label must have the keys 0, 1, ..., got {short(named)}")
    names = tuple(named[str(number)] for number in range(len(named)))
    if not names or not all(isinstance(name, str) for name in names) or len({*names}) < len(names):
        raise ValueError(f"id2label must hold different names, got {short(named)}")
    inferred = "regression" if len(names) == 1 else "single_label_classification"
    return names, keys.get("problem_type") or inferred


def _dropout(keys: Mapping[str, Any], form: Form) -> float:
    """Return the dropout of the head; the default is that of transformers, 0 for decoders."""
    found = keys.get(form.dropout)
    if found is None and form.dense is not None:
        found = 0.2 if form.dropout == "seq_classif_dropout" else keys.get("hidden_dropout_prob", 0.1)
    if not isinstance(found, int | float | None):
        raise ValueError(f"{form.dropout} must be a probability in [0, 1), got {short(found)}")
    return float(found or 0.0)


def _tokenizer_config(tokenizer: HFTokenizer, window: int, pad: int | None) -> str:
    """Make AutoTokenizer use tokenizer.json unchanged, without the special tokens of the model_type."""
    keys: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": window,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    if pad is not None:
        keys["pad_token"] = tokenizer.spelling(pad)
    return json.dumps(keys, indent=2, sort_keys=True) + "\n"


def _parts(config: Any, architecture: str) -> dict[str, list[tuple[str, Weight]]]:
    """Map transformers' name of each backbone tensor to our names within it."""
    found: dict[str, list[tuple[str, Weight]]] = {}
    for name, row in weights(config, architecture).items():
        found.setdefault(TABLES[architecture].prefix + row.name, []).append((name, row))
    return found


def _head_tensors(model: Classifier, form: Form) -> dict[str, Tensor]:
    return {_their_name(ours, form): tensor for ours, tensor in model.head.state_dict().items()}


def _their_name(ours: str, form: Form) -> str:
    part, _, kind = ours.partition(".")
    return f"{form.out_proj if part == 'out_proj' else form.dense}.{kind}"


def _check_form(model: Classifier, architecture: str, form: Form) -> None:
    bias = form.dense is not None
    wanted = f"pooling={form.pooling!r}, transform={form.transform!r}, bias={bias}"
    head = model.head
    has_bias = head.out_proj.bias is not None
    got = f"pooling={model.pooling!r}, transform={head.transform!r}, bias={has_bias}"
    if got != wanted:
        raise ValueError(f"{architecture}: the classifier of transformers has {wanted}, this one has {got}")
