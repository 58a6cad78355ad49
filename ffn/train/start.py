"""What a run begins with: a new model or its base's, with what trains chosen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ffn.gpt.adapters import add_adapters, fingerprint
from ffn.gpt.freeze import render_trained, train_only
from ffn.gpt.transformer import Transformer
from ffn.text.corpus import Corpus
from ffn.train.base import build_from, known_text, open_base
from ffn.train.config import TrainConfig


@dataclass(frozen=True)
class Start:
    """The model before the first step.

    base_fingerprint: of the base's weights, None without a base. base_corpus: the text that the base was
    trained on, where it is still there.
    """

    model: Transformer
    base_fingerprint: str | None = None
    base_corpus: Corpus | None = None


def start(config: TrainConfig, device: torch.device, say: Callable[[str], None]) -> Start:
    """Build it; random numbers come from torch's generator. ValueError for a base that will not do."""
    begun = _from_base(config, config.base, device, say) if config.base is not None else None
    begun = begun or Start(Transformer(config.model, device=device))
    loop = config.train
    if loop.only == "lora":
        add_adapters(begun.model, loop.adapter)
    if loop.only != "all":
        train_only(begun.model, loop.only, frozen_dropout=loop.frozen_dropout)
        say(render_trained(begun.model))
    return begun


def _from_base(config: TrainConfig, path: str, device: torch.device, say: Callable[[str], None]) -> Start:
    base = open_base(path, say)
    model, corpus = build_from(base, config.model, device), known_text(base)
    say(f"base         {base.file}{'' if corpus else ', without the text it was trained on'}")
    return Start(model, fingerprint(model), corpus)
