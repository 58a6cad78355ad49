"""The model that a run starts from: a new one, or a base with its tokenizer and its training text."""

from __future__ import annotations

import tomllib
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ffn import disk
from ffn.files.dataclass_toml import flatten
from ffn.gpt.adapters import add_adapters, fingerprint, merge_adapters
from ffn.gpt.freeze import render_trained, train_only
from ffn.gpt.transformer import Transformer, TransformerConfig
from ffn.interop.hf.config import TRAINING
from ffn.text.corpus import Corpus, open_corpus
from ffn.train.config import TrainConfig


@dataclass(frozen=True)
class Base:
    """A verified model on disk before its weights are read.

    Args:
        path: as it was named, a path that `ffn.load` reads.
        file: its model file, or its Hugging Face folder.
        config: of the model.
        run: the training run that it is a checkpoint of; None for another model.
        tokenizer: its tokenizer.json; None where there is none.
        state: of its checkpoint; None for another model.
    """

    path: str
    file: Path
    config: TransformerConfig
    run: Path | None
    tokenizer: Path | None
    state: dict[str, Any] | None


@dataclass(frozen=True)
class Start:
    """The model before the first step.

    Args:
        base_fingerprint: of the base's weights; None without a base.
        base_corpus: the text that the base was trained on; None where it is gone or unknown.
    """

    model: Transformer
    base_fingerprint: str | None = None
    base_corpus: Corpus | None = None


def named_base(file: str | Path | None, words: Iterable[str]) -> str | None:
    """Return the base that a TOML file or words name; errors in the rest of them are left to later."""
    try:
        named = tomllib.loads(Path(file).read_text("utf-8")).get("base") if file is not None else None
    except (OSError, ValueError):
        return None
    for word in words:
        key, _, value = word.partition("=")
        named = value if key.strip() == "base" else named
    return None if named in (None, "none") else str(named)


def open_base(path: str, say: Callable[[str], None] = warnings.warn) -> Base:
    """Find and verify the model in a path that `ffn.load` reads.

    This hashes the whole model where it is a checkpoint: open a base once and pass it on.

    Raises:
        ValueError: the model is absent, damaged or not supported.
    """
    file, state = disk.find_model(path, say)
    folder = file if file.is_dir() else file.parent
    run = folder.parent.parent if folder.parent.name == "checkpoints" else None
    places = [folder if place is None else place for place in (run, folder)]
    tokenizers = (place / "tokenizer.json" for place in places)
    tokenizer = next((found for found in tokenizers if found.is_file()), None)
    return Base(path, file, disk.inspect(file)[0], run, tokenizer, state)


def check_base(base: Base, model: TransformerConfig, tokenizer: str) -> None:
    """Raise ValueError unless a run with this model and this data.tokenizer can start from the base."""
    check_kept(base, base.config, model, tokenizer)
    if base.config.head == "none":
        raise ValueError(f"base={base.path} must have a head that predicts the next token, got head='none'")


def check_kept(base: Base, kept: TransformerConfig, model: TransformerConfig, tokenizer: str) -> None:
    """Raise ValueError unless the model has the kept config's shape and data.tokenizer is the base's.

    Where the base has no tokenizer, data.tokenizer must name one.
    """
    there, here = flatten(kept), flatten(model)
    if other := [key for key in here if here[key] != there[key] and key not in TRAINING]:
        wanted = ", ".join(f"model.{key} must be {there[key]}, got {here[key]}" for key in other)
        keys = ", ".join(f"model.{key}" for key in TRAINING)
        raise ValueError(f"base={base.path} decides the shape: {wanted}; only {keys} can be changed")
    if not tokenizer:
        raise ValueError(
            f"data.tokenizer must be the one of base={base.path}, which has no tokenizer.json; "
            "give its path, or byte"
        )
    if base.tokenizer is not None and tokenizer != str(base.tokenizer):
        raise ValueError(
            f"data.tokenizer must be {base.tokenizer}, the tokenizer of base={base.path}, got {tokenizer}; "
            "leave data.tokenizer out"
        )


def build_from(base: Base, config: TransformerConfig, device: torch.device) -> Transformer:
    """Return a model of this config with the base's weights in float32 and its adapters merged.

    With head="none" the base's head is left out.
    """
    loaded = disk.read_model(base.file, device, torch.float32)
    merge_adapters(loaded)
    if config.head == "none":
        loaded.head = None
    model = Transformer(config, device="meta")
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.origin = loaded.origin
    return model


def known_text(base: Base) -> Corpus | None:
    """Return the text that the base was trained on, if its run still has it."""
    corpus = open_corpus(base.run) if base.run is not None else None
    known = corpus is not None and base.state is not None and corpus.fingerprint == base.state["data"]
    return corpus if known else None


def start(config: TrainConfig, base: Base | None, device: torch.device, say: Callable[[str], None]) -> Start:
    """Build the model of a run, from the base if there is one, and freeze the parts that do not train.

    New weights are drawn from torch's global generator.

    Raises:
        ValueError: train.only does not fit the model, or the base is damaged.
    """
    loop = config.train
    if base is None:
        begun = Start(Transformer(config.model, device=device))
    else:
        model, corpus = build_from(base, config.model, device), known_text(base)
        say(f"base         {base.file}{'' if corpus else ', without the text it was trained on'}")
        begun = Start(model, fingerprint(model), corpus)
    if loop.only == "lora":
        add_adapters(begun.model, loop.adapter)
    if loop.only != "all":
        train_only(begun.model, loop.only, frozen_dropout=loop.frozen_dropout)
        say(render_trained(begun.model))
    return begun
