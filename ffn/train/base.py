"""The base of a fine-tuning run: the model it starts from, its tokenizer, and the text it knew."""

from __future__ import annotations

import tomllib
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from ffn import disk as checkpoint
from ffn.disk import Report
from ffn.files.dataclass_toml import flatten
from ffn.gpt.adapters import merge_adapters
from ffn.gpt.transformer import Transformer, TransformerConfig
from ffn.interop.hf.config import TRAINING
from ffn.text.corpus import Corpus, open_corpus


@dataclass(frozen=True)
class Base:
    """What is known of it before its weights are read.

    file: what `ffn.load` reads. run: the run of ours that it is of, if it is. tokenizer: its tokenizer.json,
    if there is one.
    """

    path: str
    file: Path
    config: TransformerConfig
    run: Path | None
    tokenizer: Path | None


def open_base(path: str, report: Report = warnings.warn) -> Base:
    """Find the model in a path that `ffn.load` reads; ValueError says what is absent, damaged or foreign."""
    file = checkpoint.find_model(path, report)
    folder = file if file.is_dir() else file.parent
    run = folder.parent.parent if folder.parent.name == "checkpoints" else None
    places = [folder if place is None else place for place in (run, folder)]
    tokenizers = (place / "tokenizer.json" for place in places)
    tokenizer = next((found for found in tokenizers if found.is_file()), None)
    return Base(path, file, checkpoint.inspect(file)[0], run, tokenizer)


def named_base(file: str | Path | None, words: Iterable[str]) -> str | None:
    """The base that a TOML file or words name, before anything else of them is read or found wrong."""
    try:
        named = tomllib.loads(Path(file).read_text("utf-8")).get("base") if file is not None else None
    except (OSError, ValueError):
        return None
    for word in words:
        key, _, value = word.partition("=")
        named = value if key.strip() == "base" else named
    return None if named in (None, "none") else str(named)


def check_base(base: Base, model: TransformerConfig, tokenizer: str) -> None:
    """Raise ValueError unless a run with this model and this data.tokenizer can start from the base."""
    check_kept(base, base.config, model, tokenizer)
    if base.config.head == "none":
        raise ValueError(f"base={base.path} has no head, so that nothing tells the next token; want one with")


def check_kept(base: Base, kept: TransformerConfig, model: TransformerConfig, tokenizer: str) -> None:
    """Raise ValueError where a model asks for another shape than the kept one, or data.tokenizer for another
    than the base has, or none where it has none."""
    there, here = flatten(kept), flatten(model)
    if other := [key for key in here if here[key] != there[key] and key not in TRAINING]:
        said = ", ".join(f"model.{key}={here[key]} where it has {there[key]}" for key in other)
        keys = ", ".join(f"model.{key}" for key in TRAINING)
        raise ValueError(f"base={base.path} keeps its shape: {said}; leave that out, {keys} may change")
    if not tokenizer:
        raise ValueError(
            f"base={base.path} has no tokenizer.json; say what it was trained with: data.tokenizer="
        )
    if base.tokenizer is not None and tokenizer != str(base.tokenizer):
        raise ValueError(
            f"data.tokenizer={tokenizer}: base={base.path} has its own, {base.tokenizer}; leave that out"
        )


def build_from(base: Base, config: TransformerConfig, device: torch.device) -> Transformer:
    """The base's weights in float32, its adapters merged, in a model of this config; head="none" leaves that
    out."""
    loaded = checkpoint.load(base.file, device, torch.float32)
    merge_adapters(loaded)
    if config.head == "none":
        loaded.head = None
    model = Transformer(config, device="meta")
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.origin = loaded.origin
    return model


def known_text(base: Base) -> Corpus | None:
    """The text that the base was trained on, where its run still has it."""
    corpus = open_corpus(base.run) if base.run is not None else None
    if corpus is None or corpus.fingerprint != checkpoint.read_state(base.file.parent)["data"]:
        return None
    return corpus
