"""The commands `ffn classify train | eval | predict | export`: parse arguments and call the package."""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from ffn.classify.config import read_config_and_base, read_data_config
from ffn.classify.labelled import encode_labels
from ffn.classify.report import write_predictions
from ffn.classify.result import TextClassifier, load_classifier
from ffn.classify.splits import read_data
from ffn.classify.table_files import SUFFIXES, SURROGATE
from ffn.classify.training import train
from ffn.train.device import choose_device, keep_freed_memory
from ffn.train.report import printable

AT_ONCE = 512  # texts per chunk of `predict`
FILES = (*SUFFIXES, ".txt")  # a word with such an ending is meant as a file
FOLDER = "folder written by train, or a sequence-classification model written by transformers"
DEVICE = "auto, cpu, cuda, cuda:1 or mps (default: auto)"
DATA = "a table, JSON lines, text<TAB>label lines, a folder or 'pattern.*' of one file per class"


class Once(argparse.Action):
    """An option that may be given once."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        if (before := getattr(namespace, self.dest)) is not None:
            raise argparse.ArgumentError(self, f"must be given once, got {before} and {values}")
        setattr(namespace, self.dest, values)


def add_commands(command: Callable[..., Callable[..., object]]) -> None:
    """Add the commands of `ffn classify`.

    Args:
        command: command(name, run, summary, more, key) adds one command and returns its `add_argument`.
    """
    usual = "It writes a new folder, out=FOLDER (default: runs/classify). Its config.toml lists every key."
    summary = "train on labelled text, from scratch or from a pretrained model"
    add = command("train", _train, summary, usual, "train.epochs=3")
    words = f"{DATA}; a TOML file; keys such as train.epochs=3 and out=FOLDER"
    add("words", nargs="*", metavar="DATA CONFIG key=value", help=words)
    base = "start from this pretrained model: a run, a model's folder, or a folder of Hugging Face"
    add("--from", dest="base", action=Once, metavar="PATH", help=base)

    summary = "evaluate a trained classifier on labelled text"
    add = command("eval", _eval, summary, key="data.label=stars")
    add("folder", help=FOLDER)
    add("words", nargs="+", metavar="DATA key=value", help=f"{DATA}; keys such as data.label=stars")
    add("--predictions", metavar="FILE", help="write the predictions to FILE, the worst mistakes first")
    add("--device", default="auto", help=DEVICE)

    add = command("predict", _predict, "predict the classes of texts", key="data.text=review")
    add("folder", help=FOLDER)
    texts = "texts; or one file of texts, then keys such as data.text=review; or - for standard input"
    add("words", nargs="+", metavar="TEXT", help=texts)
    add("--table", action="store_true", help="print aligned lines instead of JSON lines")
    add("--device", default="auto", help=DEVICE)

    add = command("export", _export, "export to a sequence-classification model of transformers")
    add("folder", help="folder written by train")
    add("out", help="a new folder")


def _sort_words(words: Iterable[str]) -> tuple[str | None, str | None, list[str]]:
    """Return the data, the TOML file and the key=value words; ValueError for two data or two files."""
    words = list(words)
    keys = [word for word in words if "=" in word and not os.path.exists(word)]  # noqa: PTH110 - as below
    files = [word for word in words if word not in keys and word.endswith(".toml")]
    data = [word for word in words if word not in keys and word not in files]
    for found, what in ((data, "DATA; put a pattern in quotes"), (files, "config")):
        if len(found) > 1:
            raise ValueError(f"{' '.join(found[:3])}: give one {what}")
    return next(iter(data), None), next(iter(files), None), keys


def _train(arguments: argparse.Namespace) -> int:
    keep_freed_memory()
    data, file, keys = _sort_words(arguments.words)
    keys += [f"base={arguments.base}"] if arguments.base else []
    config, base = read_config_and_base(file, keys)
    if data is not None:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, path=data))
    summary = train(config, _say, base=base)
    return 130 if summary["stopped"] == "interrupted" else 0


def _eval(arguments: argparse.Namespace) -> int:
    classifier = _load(arguments)
    data, file, keys = _sort_words(arguments.words)
    config = read_data_config(arguments.folder, keys)
    if data is None or file is not None:
        raise ValueError("eval needs the folder of a classifier and DATA, then keys such as data.label=stars")
    table = None if arguments.predictions is None else Path(arguments.predictions)
    if table is not None and (not table.parent.is_dir() or table.resolve() == Path(data).resolve()):
        raise ValueError(f"--predictions must be a new file in an existing folder, got {table}")
    numbers = not classifier.classes
    rows = read_data(config, data, _say_on_stderr, numbers=numbers)
    if numbers:
        targets = torch.tensor(rows.labels, dtype=torch.float64)
    else:
        targets, _ = encode_labels(rows, classifier.classes)
    predictions = _predictions(classifier, rows.texts)
    print(classifier.objective.scores(targets, predictions).table())
    if table is not None:
        write_predictions(table, rows, classifier.objective, targets, predictions)
    return 0


def _predict(arguments: argparse.Namespace) -> int:
    classifier = _load(arguments)
    for chunk in _chunks(_texts(arguments.words, arguments.folder)):
        for text, found in zip(chunk, _predictions(classifier, chunk).tolist(), strict=True):
            print(_answer(classifier.classes, text, found, arguments.table), flush=True)
    return 0


def _export(arguments: argparse.Namespace) -> int:
    classifier = load_classifier(arguments.folder)
    classifier.export(arguments.out)
    print(f"saved        {arguments.out}: load it with transformers' AutoModelForSequenceClassification")
    return 0


def _load(arguments: argparse.Namespace) -> TextClassifier:
    device, _ = choose_device(arguments.device)
    return load_classifier(arguments.folder, device)


def _predictions(classifier: TextClassifier, texts: Iterable[str]) -> torch.Tensor:
    rows, cut = classifier.encode(texts)
    if cut:
        _say_on_stderr(
            f"warning: {cut:,} of {len(rows):,} texts are truncated to {classifier.encode.window} tokens"
        )
    return classifier.predict_rows(rows)


def _texts(words: list[str], folder: str) -> Iterator[str]:
    """Yield the texts of the arguments, of a file, or of standard input (one per line)."""
    first, rest = words[0], words[1:]
    if words == ["-"]:
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(encoding="utf-8-sig", errors="surrogateescape")
        yield from _checked(("standard input", n, line) for n, line in enumerate(sys.stdin, 1))
    elif os.path.isfile(first):  # noqa: PTH113 - Path.is_file raises for a text too long for a name
        if other := [word for word in rest if not word.startswith("data.")]:
            raise ValueError(f"{other[0]}: after the file {first} give only keys such as data.text=review")
        yield from read_data(read_data_config(folder, rest), first, _say_on_stderr, labels=False).texts
    elif not rest and len(first.split()) == 1 and _looks_like_a_file(first):
        raise ValueError(f"{first}: no such file; if it is a text, give - and pass it on standard input")
    else:
        yield from _checked(("text", number, text) for number, text in enumerate(words, 1))


def _looks_like_a_file(word: str) -> bool:
    return os.path.isdir(word) or word.lower().endswith(FILES)  # noqa: PTH112 - as above


def _checked(texts: Iterable[tuple[str, int, str]]) -> Iterator[str]:
    for source, number, text in texts:
        if not text.strip():
            raise ValueError(f"{source}:{number}: empty text")
        if SURROGATE.search(text):
            raise ValueError(f"{source}:{number}: not utf-8; pass a file of another encoding by name")
        yield text.rstrip("\r\n")


def _chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    """Yield chunks of texts (of 1 on a terminal); texts before an error are yielded before it is raised."""
    at_once, chunk = 1 if sys.stdin.isatty() else AT_ONCE, []
    try:
        for text in texts:
            chunk.append(text)
            if len(chunk) == at_once:
                yield chunk
                chunk = []
    except ValueError:
        if chunk:
            yield chunk
        raise
    if chunk:
        yield chunk


def _answer(classes: tuple[str, ...], text: str, found: Any, table: bool) -> str:
    """Format the prediction for one text: a number, or probabilities of the classes."""
    if not classes:
        return f"{found:12.6g}  {_one_line(text)}" if table else _json(text=text, value=found)
    best = max(range(len(classes)), key=lambda i: found[i])
    if table:
        width = max(map(len, classes))
        return f"{classes[best]:{width}}  {found[best]:.4f}  {_one_line(text)}"
    named = dict(zip(classes, found, strict=True))
    return _json(text=text, label=classes[best], probability=found[best], probabilities=named)


def _one_line(text: str) -> str:
    return " ".join(printable(text).split())


def _json(**values: object) -> str:
    return json.dumps(values, ensure_ascii=False)


def _say(text: str) -> None:
    print(text, flush=True)


def _say_on_stderr(line: str) -> None:
    print(line, file=sys.stderr)
