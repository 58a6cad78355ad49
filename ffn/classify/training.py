"""Train a classifier: from one configuration to one folder.

    train(read_config(words=["data.path=reviews.csv", "base=MODEL", "train.only=head"]))

The folder is written at the end, whole or not at all; see `ffn.classify.result`.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from ffn.classify.batches import TextEncoder
from ffn.classify.config import ClassifyConfig
from ffn.classify.loop import Outcome, Source, TokenSource, cache_features, fit
from ffn.classify.metrics import Scores
from ffn.classify.objective import Objective
from ffn.classify.report import NO_PICTURES, EpochScreen, draw, write_history, write_predictions
from ffn.classify.result import TextClassifier, check_new, new_folder, save_classifier
from ffn.classify.splits import Splits, read_splits
from ffn.classify.vocabulary import train_tokenizer
from ffn.files.atomic import write_file
from ffn.files.dataclass_toml import to_toml
from ffn.gpt.adapters import add_adapters, merge_adapters
from ffn.gpt.freeze import render_trained, train_only
from ffn.gpt.transformer import Transformer
from ffn.nn.classifier import Classifier
from ffn.text.tokenizer import Tokenizer, load_tokenizer
from ffn.train.base import Base, build_from, check_kept, open_base
from ffn.train.device import Precision, choose_device, choose_precision

Say = Callable[[str], None]


def train(
    config: ClassifyConfig, say: Say = print, splits: Splits | None = None, base: Base | None = None
) -> dict[str, Any]:
    """Train, evaluate, and write the folder `config.out`; return the content of metrics.json.

    Ctrl-C ends training with the best epoch so far.

    Args:
        say: receives lines of progress.
        splits: train, validation and test data; by default they are read from `config.data`.
        base: the opened `config.base`; by default it is opened here.

    Raises:
        ValueError: a configuration or data that cannot be used.
        FloatingPointError: the loss is not finite.
        OSError: the folder cannot be written.
    """
    check_new(Path(config.out))
    device, why = choose_device(config.device)
    precision, why_precision = choose_precision(config.train.precision, device)
    say(f"device       {device} ({why})")
    say(f"precision    {precision} ({why_precision})")
    splits = read_splits(config, say) if splits is None else splits
    if config.base:
        backbone, tokenizer = load_backbone(base or open_base(config.base), config, device)
    else:
        config, tokenizer = _from_scratch(config, splits.rows["train"].texts)
        backbone = None
    model = config.model if backbone is None else backbone.config
    encode = TextEncoder(tokenizer, model.max_seq_len, _pad(backbone))
    sources = splits.encode(encode, config.train.word_dropout, say)
    run = Training(config, splits, backbone, sources, device, precision, say)
    for seed in config.train.seeds:
        try:
            run.fit(seed)
        except KeyboardInterrupt:
            if not run.members:
                raise
            run.interrupted = True
        if run.interrupted:
            say(f"interrupted  with {len(run.members)} of {len(config.train.seeds)} models")
            break
    classifier = TextClassifier(run.members, run.fold_scale(), encode)
    return _finish(config, splits, run, classifier)


class Training:
    """Trains the members of an ensemble (usually one): `fit` for each seed."""

    def __init__(
        self,
        config: ClassifyConfig,
        splits: Splits,
        backbone: Transformer | None,
        sources: dict[str, TokenSource],
        device: torch.device,
        precision: Precision,
        say: Say,
    ) -> None:
        self.config, self.splits, self.backbone = config, splits, backbone
        self.tokens, self.device, self.say = sources, device, say
        self.precision: Precision = precision
        self.sources: dict[str, Source] = {}  # input of the model: tokens or cached features
        self.members: list[Classifier] = []
        self.outcomes: dict[int, Outcome] = {}
        self.cache_seconds: float | None = None
        self.trained = 0  # parameters of one member, adapters included
        self.interrupted = False

    def _model(self, seed: int) -> Classifier:
        """Return a new classifier; it shares the pretrained backbone unless members would change it."""
        config, backbone = self.config, self.backbone
        torch.manual_seed(seed)
        if backbone is None:
            backbone = Transformer(config.model, device=self.device)
        elif config.train.only != "head" and len(config.train.seeds) > 1:
            backbone = copy.deepcopy(backbone)
        if config.train.only == "lora":
            add_adapters(backbone, config.train.adapter)
        return Classifier(
            backbone,
            self.splits.objective.num_logits,
            config.head.chosen(backbone.config.causal),
            config.head.transform,
            config.head.dropout,
            bias=True
            if config.train.loss == "mse"
            else None,  # regression folds the mean of its targets into the bias
        )

    def fit(self, seed: int) -> None:
        """Train one member."""
        config = self.config
        options = dataclasses.replace(config.train, lr=config.chosen_lr)
        model = self._model(seed)
        train_only(model, options.only, frozen_dropout=options.frozen_dropout)
        if not self.members:
            self.say(render_trained(model))
            self._prepare(model)
        self.trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        steps = options.epochs * math.ceil(len(self.splits.rows["train"]) / options.batch_size)
        metric = options.chosen_metric
        with closing(EpochScreen(self.say, steps, options.epochs, metric)) as progress:
            outcome = fit(
                model,
                self.sources,
                self.splits.targets,
                self.splits.objective,
                options,
                seed=seed,
                precision=self.precision,
                watcher=progress,
            )
        self.outcomes[seed] = outcome
        self.interrupted = outcome.stopped == "interrupted"
        if options.only == "lora":
            merge_adapters(model)
        self.members.append(model)
        best = f"{metric} {outcome.best:.4f} after epoch {outcome.best_epoch}"
        self.say(f"seed {seed:<8}{outcome.stopped}, {best}, {outcome.seconds:.1f} s of training")

    def _prepare(self, model: Classifier) -> None:
        """Choose the input of the model: features cached once if only the head trains, else tokens."""
        self.sources = dict(self.tokens)
        options = self.config.train
        if options.only != "head" or not options.cache:
            return
        for name in ("word_dropout", "frozen_dropout"):
            if getattr(options, name):
                self.say(f"not cached   train.{name} changes the features in each epoch")
                return
        start = time.perf_counter()
        self.sources = {n: cache_features(model, s, self.precision) for n, s in self.tokens.items()}
        self.cache_seconds = time.perf_counter() - start
        self.say(f"cached       features of all texts in {self.cache_seconds:.1f} s")

    def fold_scale(self) -> Objective:
        """Fold the center and scale of regression targets into the weights; return the new objective."""
        objective = self.splits.objective
        for model in self.members:
            with torch.no_grad():
                linear = model.head.out_proj
                linear.weight.mul_(objective.scale)
                if linear.bias is not None:
                    linear.bias.mul_(objective.scale).add_(objective.center)
        return dataclasses.replace(objective, center=0.0, scale=1.0)


def load_backbone(base: Base, config: ClassifyConfig, device: torch.device) -> tuple[Transformer, Tokenizer]:
    """Return the base's model (float32, no head, the dropouts of `config.model`) and its tokenizer.

    Raises:
        ValueError: the tokenizer does not belong to the model, or the config asks for another shape.
    """
    tokenizer = config.data.tokenizer
    check_kept(base, dataclasses.replace(base.config, head="none"), config.model, tokenizer)
    found = load_tokenizer(tokenizer)
    if found.vocab_size > config.model.vocab_size:
        sizes = f"{found.vocab_size} entries, the model {config.model.vocab_size}"
        raise ValueError(f"{base.path}: the tokenizer has {sizes}; they do not match")
    return build_from(base, config.model, device), found


def _from_scratch(config: ClassifyConfig, texts: Sequence[str]) -> tuple[ClassifyConfig, Tokenizer]:
    """Train a tokenizer; return the config with its vocabulary size, and the tokenizer."""
    if config.train.only != "all":
        raise ValueError(
            f"train.only={config.train.only} needs a pretrained model: give --from MODEL or base=MODEL"
        )
    start = config.head.chosen(config.model.causal) == "first"
    tokenizer = train_tokenizer(config.data.tokenizer, texts, config.model.vocab_size, start=start)
    model = dataclasses.replace(config.model, vocab_size=tokenizer.vocab_size, head="none")
    return dataclasses.replace(config, model=model), tokenizer


def _pad(backbone: Transformer | None) -> int | None:
    """Return the padding id of a pretrained model, if it has one."""
    if backbone is None:
        return None
    own = backbone.config.pad_token_id
    return (backbone.origin or {}).get("pad_token_id") if own is None else own


def _finish(
    config: ClassifyConfig, splits: Splits, run: Training, classifier: TextClassifier
) -> dict[str, Any]:
    """Evaluate the ensemble, write the folder and print the result."""
    objective, found = classifier.objective, {}
    for name in ("val", "test"):
        found[name] = classifier.predict_rows(run.tokens[name].rows)
    scores = {name: objective.scores(splits.targets[name], found[name]) for name in found}
    summary = _summary(config, splits, run, scores)
    out, metric = Path(config.out), config.train.chosen_metric
    with new_folder(out) as folder:
        save_classifier(folder, classifier)
        write_file(folder / "config.toml", to_toml(config))
        write_file(folder / "metrics.json", json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
        write_history(folder / "metrics.csv", run.outcomes)
        write_predictions(
            folder / "predictions.csv", splits.rows["test"], objective, splits.targets["test"], found["test"]
        )
        drawn = draw(folder, run.outcomes, metric, scores["test"])
    run.say(f"\n{scores['test'].table()}\n")
    if not drawn:
        run.say(NO_PICTURES)
    run.say(
        f"saved        {out}: the model, config.toml, metrics.json, predictions.csv (worst mistakes first)"
    )
    run.say(f"predict      ffn classify predict {out} TEXT")
    return summary


def _summary(
    config: ClassifyConfig, splits: Splits, run: Training, scores: dict[str, Scores]
) -> dict[str, Any]:
    """Return the content of metrics.json."""
    model = run.members[0]
    members = [
        {"seed": seed, "stopped": o.stopped, "best_epoch": o.best_epoch, "epochs": len(o.history)}
        | {f"best_{config.train.chosen_metric}": o.best, "train_seconds": o.seconds}
        for seed, o in run.outcomes.items()
    ]
    return {
        "stopped": "interrupted" if run.interrupted else "finished",
        **{name: score.to_dict() for name, score in scores.items()},
        "rows": {name: len(rows) for name, rows in splits.rows.items()},
        "data": splits.counts,
        "members": members,
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained_parameters": run.trained,
        "cache_seconds": run.cache_seconds,
        "device": run.device.type,
        "precision": run.precision,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
