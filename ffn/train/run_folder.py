"""The folder of a run: its config.toml is read, claimed and compared, its tokens are opened or made."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path

from ffn.files import dataclass_toml
from ffn.files.atomic import write_file
from ffn.files.checkpoints import list_checkpoints, newest_checkpoint
from ffn.files.dataclass_toml import flatten, from_toml, to_toml
from ffn.gpt.freeze import check_choice
from ffn.text.corpus import Corpus, DataConfig, open_corpus, prepare
from ffn.text.tokenizer import Tokenizer
from ffn.train.base import Base, check_base, named_base, open_base
from ffn.train.config import WHERE, TrainConfig


def read_config(file: str | Path | None, words: Iterable[str] = (), base: Base | None = None) -> TrainConfig:
    """Return the defaults, changed by a TOML file, then by words such as `train.steps=100`.

    Where file or words name a base, the defaults of model and data.tokenizer are the base's; a config.toml
    that a run wrote holds every key, so there the base is not needed.

    Args:
        base: the named base, where it is open already.

    Raises:
        ValueError: a key or a value is wrong, or the base is.
    """
    words, config = list(words), TrainConfig()
    path = named_base(file, words)
    if path is not None and not (file is not None and _is_written_by_a_run(Path(file))):
        base = base or open_base(path)
        data = DataConfig(tokenizer=str(base.tokenizer or ""))
        config = TrainConfig(out="runs/tuned", data=data, model=base.config)
    return dataclass_toml.read_config(config, file, words)


def check_options(config: TrainConfig) -> None:
    """Raise ValueError if options of `train` do not fit the model; nothing is read or written."""
    loop, model = config.train, config.model
    if loop.sample_tokens and not model.causal:
        raise ValueError(
            "train.sample_tokens must be 0 with model.causal=false, which generates nothing; "
            f"got {loop.sample_tokens}"
        )
    if loop.window > model.max_seq_len:
        raise ValueError(
            f"train.window must be at most model.max_seq_len={model.max_seq_len}, got {loop.window}"
        )
    if check_choice(loop.only, "train.only") > model.num_layers:
        raise ValueError(f"train.only must be at most last:{model.num_layers} in this model, got {loop.only}")
    if loop.only == "head" and model.head == "logits" and model.tie_embeddings:
        raise ValueError(
            "train.only=head needs an untied head; this model ties it to the embedding; try train.only=last:1"
        )


def open_run(
    config: TrainConfig, base: Base | None, say: Callable[[str], None]
) -> tuple[TrainConfig, Corpus]:
    """Return the config with the tokenizer's vocabulary size, written to the run's folder, and the corpus.

    A run with checkpoints keeps the tokens it began with; if lost, they are made again from the same text.

    Args:
        base: config.base, opened; None without one.

    Raises:
        ValueError: the base does not fit, the folder holds something else or a run of another configuration,
            no checkpoint is good, or the text is absent or has changed. Nothing was written.
    """
    if base is not None:
        check_base(base, config.model, config.data.tokenizer)
    run = Path(config.out)
    file = run / "config.toml"
    if file.exists() and list_checkpoints(run):
        _check_same_run(config, file)
        corpus = _corpus_of_checkpoints(config, say)
    else:
        corpus = _first_corpus(config, file)
    config = _with_vocabulary(config, corpus.tokenizer)
    write_file(file, to_toml(config))
    for note in corpus.notes:
        say(f"data         {note}")
    sizes = f"{len(corpus.train):,} to train on, {len(corpus.val):,} to validate on"
    say(f"tokens       {sizes}, vocabulary of {corpus.tokenizer.vocab_size}")
    return config, corpus


def _with_vocabulary(config: TrainConfig, tokenizer: Tokenizer) -> TrainConfig:
    """Set model.vocab_size to the tokenizer's; ValueError where another size was given.

    A base may know more entries than its tokenizer has.
    """
    size = tokenizer.vocab_size
    if config.base is not None and size <= config.model.vocab_size:
        return config
    if config.model.vocab_size not in (size, TrainConfig().model.vocab_size):
        raise ValueError(
            f"model.vocab_size must be {size}, the size of the tokenizer {config.data.tokenizer}, "
            f"got {config.model.vocab_size}; leave model.vocab_size out"
        )
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=size))


def _first_corpus(config: TrainConfig, file: Path) -> Corpus:
    """Make the corpus of a run without checkpoints; first config.toml is written, to claim the folder."""
    run = file.parent
    fresh = all(path.name.startswith(".") for path in run.iterdir())
    if not fresh and not _is_written_by_a_run(file):
        raise ValueError(f"out={run}: the folder holds other files; give a new one or that of a run")
    write_file(file, to_toml(config))
    try:
        return prepare(config.data, run)
    except ValueError:
        if fresh:
            file.unlink()
        raise


def _is_written_by_a_run(file: Path) -> bool:
    """True if the file is exactly as a run writes it: a file that a person wrote is never overwritten."""
    try:
        text = file.read_text("utf-8")
        return text == to_toml(from_toml(TrainConfig, text))
    except (OSError, ValueError):
        return False


def _corpus_of_checkpoints(config: TrainConfig, say: Callable[[str], None]) -> Corpus:
    run = Path(config.out)
    corpus = open_corpus(run)
    if corpus is None:
        newest = newest_checkpoint(run, {}, say)
        if newest is None:
            raise ValueError(f"no checkpoint in {run} is good; to start anew give another folder: out=...")
        corpus = prepare(config.data, run, wanted=newest[1]["data"])
    return corpus


def _check_same_run(config: TrainConfig, file: Path) -> None:
    """Raise ValueError, with the keys that differ, unless `file` is the config of the same run."""
    here, there = flatten(config), flatten(read_config(file))
    ignored = {*WHERE, "model.vocab_size"}  # the tokenizer decides the vocabulary size
    differing = [
        f"{key}={here[key]} where the run has {there[key]}"
        for key in here
        if key not in ignored and here[key] != there[key]
    ]
    if differing:
        raise ValueError(
            f"{file.parent} holds a run of another configuration: {', '.join(differing)}; "
            "to start a new run give another folder: out=..."
        )
