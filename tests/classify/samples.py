"""Texts of two or three topics that a tiny model separates, and a configuration that trains in a second."""

from __future__ import annotations

import csv
import random
from pathlib import Path

import torch

import ffn
from ffn.classify.config import ClassifyConfig, read_config
from ffn.gpt.transformer import Transformer, TransformerConfig
from ffn.text.tokenizer import ByteTokenizer

TOPICS = {
    "food": ["bread", "soup", "apple", "salt", "oven", "spoon"],
    "sea": ["wave", "boat", "sail", "salt", "storm", "harbour"],
    "music": ["drum", "song", "flute", "choir", "apple", "rhythm"],
}
COMMON = ["the", "a", "of", "and", "on", "it", "was", "very", "quite", "some"]
MODEL = [
    "model.dim=16",
    "model.num_layers=2",
    "model.num_heads=2",
    "model.hidden_dim=24",
    "model.max_seq_len=12",
]
PRETRAINED = TransformerConfig(
    vocab_size=256, dim=16, num_layers=2, num_heads=2, hidden_dim=24, max_seq_len=48, dropout=0.1
)
WORDS = [
    *MODEL, "device=cpu", "train.precision=float32", "train.epochs=4", "train.batch_size=8", "train.lr=5e-3",
    "data.tokenizer=char", "model.dropout=0.0", "head.dropout=0.0",
]  # fmt: skip


def write_base(folder: Path, shape: TransformerConfig = PRETRAINED) -> Path:
    """Write a byte-level decoder with its tokenizer, like a run of `ffn train`."""
    torch.manual_seed(0)
    ffn.save(folder, Transformer(shape))
    ByteTokenizer().save(folder / "tokenizer.json")
    return folder


def texts(count: int, classes: int = 3, seed: int = 0) -> list[tuple[str, str]]:
    """Return (text, label) pairs; all texts differ."""
    draw, found = random.Random(seed), {}
    names = list(TOPICS)[:classes]
    while len(found) < count:
        name = names[len(found) % classes]
        words = draw.choices(TOPICS[name], k=draw.randint(1, 3)) + draw.choices(COMMON, k=draw.randint(1, 4))
        draw.shuffle(words)
        found.setdefault(" ".join(words), name)
    return list(found.items())


def write_table(
    path: Path, rows: list[tuple[str, object]], columns: tuple[str, str] = ("text", "label")
) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


def config(folder: Path, *words: str, count: int = 90, classes: int = 3) -> ClassifyConfig:
    """Return a config that trains on `folder/texts.csv` (written if absent) into `folder/run`."""
    if not (folder / "texts.csv").exists():
        write_table(folder / "texts.csv", texts(count, classes))
    pretrained = any(word.startswith("base=") for word in words)
    common = [w for w in WORDS if not (pretrained and w.startswith(("model.", "data.tokenizer")))]
    return read_config(None, [f"data.path={folder / 'texts.csv'}", f"out={folder / 'run'}", *common, *words])


def quiet(_: str) -> None:
    pass
