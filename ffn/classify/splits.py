"""Read the train, val and test splits, split off those that are not given, and encode them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ffn.classify.batches import TextEncoder
from ffn.classify.config import ClassifyConfig, DataConfig, FitConfig
from ffn.classify.labelled import Labelled, encode_labels, overlap, read_labelled, split
from ffn.classify.loop import TokenSource
from ffn.classify.objective import Objective, parse_class_weights

SPLITS = ("train", "val", "test")


@dataclass
class Splits:
    """Rows and targets of train, val and test, the objective, and counts of skipped or truncated rows."""

    rows: dict[str, Labelled]
    targets: dict[str, Tensor]
    objective: Objective
    counts: dict[str, int] = field(default_factory=dict)

    def encode(
        self, encode: TextEncoder, word_dropout: float, say: Callable[[str], None]
    ) -> dict[str, TokenSource]:
        """Encode the texts of each split; report how many were truncated."""
        found = {}
        for name, rows in self.rows.items():
            tokens, cut = encode(rows.texts)
            found[name] = TokenSource(tokens, encode, word_dropout)
            self.counts[f"{name}_truncated"] = cut
            if cut:
                say(f"warning: {cut:,} of {len(rows):,} {name} texts are truncated to {encode.window} tokens")
        return found


def read_splits(config: ClassifyConfig, say: Callable[[str], None]) -> Splits:
    """Return all three splits; ValueError if they cannot be read or learned from."""
    if not config.data.path:
        raise ValueError("data.path is missing: give a file or folder of labelled text")
    rows, counts = _split(config, say)
    targets, objective = _targets(config.train, rows)
    kinds = f"{len(objective.classes)} classes" if objective.classes else "numbers"
    sizes = ", ".join(f"{len(rows[name]):,} {name}" for name in SPLITS)
    say(f"data         {sizes}; {kinds}")
    for name in ("val", "test"):
        counts[f"{name}_in_train"] = found = overlap(rows["train"], rows[name])
        if found:
            say(f"warning: {found:,} of {len(rows[name]):,} {name} texts also occur in the training texts")
    return Splits(rows, targets, objective, counts)


def read_data(
    config: DataConfig, path: str, say: Callable[[str], None], *, numbers: bool = False, labels: bool = True
) -> Labelled:
    """Read one file or folder as the configuration says; report how many rows were skipped."""
    rows = read_labelled(
        path,
        config.text,
        config.label if labels else None,
        format=None if config.format == "auto" else config.format,
        encoding=config.encoding,
        quotes=config.quotes,
        numbers=numbers,
        skip_empty=config.skip_empty,
    )
    if rows.skipped:
        say(f"warning: {len(rows.skipped):,} rows of {path} have no text and are skipped")
    return rows


def _split(config: ClassifyConfig, say: Callable[[str], None]) -> tuple[dict[str, Labelled], dict[str, int]]:
    data, found, counts = config.data, {}, {}
    for name, path in (("train", data.path), ("val", data.val), ("test", data.test)):
        if path:
            found[name] = read_data(data, path, say, numbers=config.train.loss == "mse")
            counts[f"{name}_skipped"] = len(found[name].skipped)
    shares = {"val": data.val_fraction, "test": data.test_fraction}
    cut = {name: share for name, share in shares.items() if name not in found}
    if cut:
        rest = 1.0 - sum(cut.values())
        if rest <= 0.0:
            raise ValueError("data.val_fraction and data.test_fraction must sum to less than 1")
        splits = split(found["train"], (rest, *cut.values()), data.seed)
        found |= dict(zip(("train", *cut), splits, strict=True))
    return {name: found[name] for name in SPLITS}, counts


def _targets(options: FitConfig, rows: dict[str, Labelled]) -> tuple[dict[str, Tensor], Objective]:
    if options.loss == "mse":
        found = {name: torch.tensor(labelled.labels, dtype=torch.float64) for name, labelled in rows.items()}
        center, spread = float(found["train"].mean()), float(found["train"].std(correction=0))
        return found, Objective("mse", center=center, scale=spread or 1.0)
    numbers, classes = encode_labels(rows["train"])
    if options.metric == "roc_auc" and len(classes) != 2:
        raise ValueError(f"train.metric=roc_auc needs two classes, got {len(classes)}; use f1_macro")
    found = {name: encode_labels(labelled, classes)[0] for name, labelled in rows.items()}
    objective = Objective(options.loss, classes, label_smoothing=options.label_smoothing)
    weights = parse_class_weights(options.class_weights, classes, numbers)
    return found, dataclasses.replace(objective, class_weights=weights)
