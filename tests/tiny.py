"""A text and a configuration for a training run of one second, and a summary of its results."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ffn.files.dataclass_toml import apply_overrides
from ffn.gpt.transformer import TransformerConfig
from ffn.train.config import TrainConfig

TEXT = "".join(f"{i} times {i} is {i * i}.\n" for i in range(400))
MODEL = TransformerConfig(
    vocab_size=256, dim=16, num_layers=1, num_heads=2, max_seq_len=16, dropout=0.1, ffn_dropout=0.1
)
WORDS = [
    "device=cpu",
    "train.steps=12",
    "train.batch_size=2",
    "train.precision=float32",
    "train.eval_every=6",
    "train.eval_batches=2",
    "train.checkpoint_every=4",
    "train.log_every=2",
    "train.warmup=2",
    "train.sample_tokens=5",
]


def config(folder: Path, *words: str) -> TrainConfig:
    """Write `folder/text.txt` and return the configuration that trains on it into `folder/run`."""
    (folder / "text.txt").write_text(TEXT)
    base = dataclasses.replace(TrainConfig(), model=MODEL)
    paths = [f"data.path={folder / 'text.txt'}", f"out={folder / 'run'}"]
    return apply_overrides(base, [*paths, *WORDS, *words])


def quiet(_: str) -> None:
    pass


def outcome(run: Path) -> tuple[bytes, bytes, bytes]:
    """Return what must be equal in equal runs: the last weights, the metrics and the samples."""
    last = max((run / "checkpoints").iterdir()) / "model.safetensors"
    return last.read_bytes(), (run / "metrics.csv").read_bytes(), (run / "samples.txt").read_bytes()
