"""A trained classifier and its folder on disk, written whole or not at all.

FOLDER/model.safetensors    the backbone; `ffn.load` reads it and returns the Transformer without the head
       head.safetensors     the head
       classifier.json      the classes, pooling, window and padding, the origin of the backbone
       tokenizer.json       config.toml metrics.json metrics.csv predictions.csv curves.png confusion.png
       member-2/ ...        the other members of an ensemble; without model.safetensors they share it

classifier = load_classifier(FOLDER)
classifier.predict(["a fine film"])         # probabilities (N, K), or numbers (N,)
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ffn import disk
from ffn.classify.batches import TextEncoder
from ffn.classify.loop import TokenSource, compute_logits
from ffn.classify.objective import METRICS, Objective
from ffn.files.atomic import replacing, write_file
from ffn.files.checkpoints import MODEL
from ffn.files.shards import open_shards, write_tensors
from ffn.files.strict_json import read_json, short
from ffn.gpt.transformer import Transformer
from ffn.interop.hf.classifier import load_classifier_folder, save_classifier_folder
from ffn.interop.hf.folder import is_folder
from ffn.nn.classifier import Classifier
from ffn.text.tokenizer import HFTokenizer, load_tokenizer

FORMAT = 1
HEAD, FACTS, TOKENIZER = "head.safetensors", "classifier.json", "tokenizer.json"


@dataclass
class TextClassifier:
    """A classifier of texts: the predictions of its members (usually one) are averaged."""

    members: Sequence[Classifier]
    objective: Objective
    encode: TextEncoder

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of the probabilities; () for regression."""
        return self.objective.classes

    def predict(self, texts: Iterable[str]) -> Tensor:
        """Return probabilities (N, K), or numbers (N,) for regression, float64; the mean over members."""
        return self.predict_rows(self.encode(texts)[0])

    def predict_rows(self, rows: list[list[int]]) -> Tensor:
        """Predict from rows of token ids that `encode` returned."""
        source = TokenSource(rows, self.encode)
        found = [self.objective.predictions(compute_logits(member, source)) for member in self.members]
        return torch.stack(found).mean(0)

    def export(self, path: str | Path) -> None:
        """Write a sequence-classification model of transformers into a new folder, whole or not at all.

        Raises:
            ValueError: several members, no such model in transformers, or a folder that is not empty.
        """
        path = Path(path)
        if len(self.members) > 1:
            raise ValueError(f"transformers has no model that averages {len(self.members)} members")
        loss, tokenizer = self.objective.loss_name, self.encode.tokenizer
        labels, kind = {
            "cross_entropy": (self.classes, "single_label_classification"),
            "binary_cross_entropy": (self.classes[1:], "multi_label_classification"),  # of one label
            "mse": (("value",), "regression"),
        }[loss]
        check_new(path)
        with new_folder(path) as folder:
            save_classifier_folder(
                folder,
                self.members[0],
                labels,
                kind,
                pad_token_id=self._padding(),
                tokenizer=tokenizer if isinstance(tokenizer, HFTokenizer) else None,
            )

    def _padding(self) -> int | None:
        """Return the padding id of an export.

        transformers reads a decoder at the last token before padding, so no text may end with this id: it is
        the model's, the tokenizer's, or by custom the id of the end of a document.
        """
        backbone, encode = self.members[0].backbone, self.encode
        if not backbone.config.causal:
            return encode.pad
        origin = getattr(backbone, "origin", None) or {}
        if (given := origin.get("pad_token_id")) is not None and given in encode.suffix:
            raise ValueError(
                f"token {given} is the padding and ends each text; transformers would not find the last token"
            )
        hf = encode.tokenizer if isinstance(encode.tokenizer, HFTokenizer) else None
        own = hf.number("[PAD]", "<pad>") if hf else None
        ends = (number for number in (given, own, origin.get("eos_token_id")) if isinstance(number, int))
        return next((number for number in ends if number not in encode.suffix), None)


def save_classifier(folder: Path, classifier: TextClassifier) -> None:
    """Write the files that `load_classifier` reads into an existing folder."""
    first = classifier.members[0]
    facts = {
        "format": FORMAT,
        "loss": classifier.objective.loss_name,
        "classes": list(classifier.classes),
        "pooling": first.pooling,
        "transform": first.head.transform,
        "bias": first.head.out_proj.bias is not None,
        "dropout": first.head.dropout,
        "window": classifier.encode.window,
        "pad": classifier.encode.pad,
        "members": len(classifier.members),
        "origin": getattr(first.backbone, "origin", None),
    }
    for number, member in enumerate(classifier.members, start=1):
        place = _member(folder, number)
        place.mkdir(exist_ok=True)
        if number == 1 or member.backbone is not first.backbone:
            disk.save_model(place, member.backbone)  # type: ignore[arg-type] - a Transformer
        write_tensors(place / HEAD, member.head.state_dict(), {})
    classifier.encode.tokenizer.save(folder / TOKENIZER)
    write_file(folder / FACTS, json.dumps(facts, indent=1, ensure_ascii=False) + "\n")


def load_classifier(path: str | Path, device: str | torch.device = "cpu") -> TextClassifier:
    """Load a classifier that `ffn classify train` or transformers wrote, in eval mode.

    Raises:
        ValueError: a file is absent, damaged or does not match the others.
    """
    folder = Path(path)
    if not (folder / FACTS).is_file():
        if folder.is_dir() and is_folder(folder):
            return _of_transformers(folder, device)
        raise ValueError(f"{folder} is not the folder of a classifier: it has no {FACTS}")
    facts = _read_facts(folder / FACTS)
    members: list[Classifier] = []
    for number in range(1, facts["members"] + 1):
        place = _member(folder, number)
        own = number == 1 or (place / MODEL).is_file()
        backbone = disk.load(place / MODEL, device) if own else members[0].backbone
        backbone.origin = facts["origin"]  # type: ignore[attr-defined]
        members.append(_classifier(place, backbone, facts))
    objective = Objective(facts["loss"], tuple(facts["classes"]))
    tokenizer = load_tokenizer(folder / TOKENIZER)
    config = members[0].backbone.config
    if facts["window"] > config.max_seq_len or tokenizer.vocab_size > config.vocab_size:
        raise ValueError(f"{folder}: {FACTS}, {TOKENIZER} and {MODEL} do not belong together")
    return TextClassifier(members, objective, TextEncoder(tokenizer, facts["window"], facts["pad"]))


def _of_transformers(folder: Path, device: str | torch.device) -> TextClassifier:
    """Load a sequence-classification model of transformers with its tokenizer.json."""
    model, labels, kind = load_classifier_folder(folder, device)
    match kind, len(labels):
        case "regression", 1:
            objective = Objective("mse")
        case "single_label_classification", count if count > 1:
            objective = Objective("cross_entropy", labels)
        case "multi_label_classification", 1:
            objective = Objective("binary_cross_entropy", (f"not {labels[0]}", labels[0]))
        case _:
            raise ValueError(
                f"{folder}: problem_type={short(kind)} with {len(labels)} labels is not supported"
            )
    assert isinstance(model.backbone, Transformer)
    config, pad = model.backbone.config, (model.backbone.origin or {}).get("pad_token_id")
    encode = TextEncoder(load_tokenizer(folder / TOKENIZER), config.max_seq_len, pad)
    while config.causal and encode.suffix[-1:] == [
        pad
    ]:  # transformers reads the last token that is not padding
        encode.suffix = encode.suffix[:-1]
    return TextClassifier([model], objective, encode)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder; rename it to `path` on success, remove it on an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        partial.mkdir()
        yield partial


def check_new(path: Path) -> None:
    """Raise ValueError before training if `new_folder` would fail after it."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"out={path} already exists; give another out=... or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"out={path}: {path.parent} is not writable; give another out=...")


def _member(folder: Path, number: int) -> Path:
    return folder if number == 1 else folder / f"member-{number}"


def _classifier(place: Path, backbone, facts: dict[str, Any]) -> Classifier:
    """Load the head onto its backbone; check its weights first."""
    num_logits = Objective(facts["loss"], tuple(facts["classes"])).num_logits
    form = facts["pooling"], facts["transform"], facts["dropout"]
    made = Classifier(backbone, num_logits, *form, bias=facts["bias"])
    shards, wanted = open_shards(place / HEAD), made.head.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in wanted.items()}
    if {name: spec.shape for name, spec in shards.specs.items()} != shapes:
        raise ValueError(f"{place / HEAD}: the weights do not match {FACTS}, which needs {', '.join(shapes)}")
    made.head.load_state_dict(dict(shards))
    return made.eval()


def _read_facts(path: Path) -> dict[str, Any]:
    facts = read_json(path)
    if facts.get("format") != FORMAT:
        got = short(facts.get("format"))
        raise ValueError(f"{path}: its format is {got}, this version reads {FORMAT}")
    kinds: dict[str, Any] = {
        "loss": str, "classes": list, "pooling": str, "transform": (str, type(None)), "bias": bool,
        "dropout": (int, float), "window": int, "pad": int, "members": int, "origin": (dict, type(None)),
    }  # fmt: skip
    wrong = [name for name, kind in kinds.items() if not isinstance(facts.get(name), kind)]
    wrong = wrong or [name for name in ("window", "members") if facts[name] < 1]
    wrong = wrong or ["classes"] * (not all(isinstance(name, str) for name in facts["classes"]))
    wrong = wrong or ["loss"] * (facts["loss"] not in METRICS)
    if wrong:
        raise ValueError(f"{path}: damaged: {wrong[0]}={short(facts.get(wrong[0]))}")
    return facts
