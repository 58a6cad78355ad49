"""`ffn classify train | eval | predict | export`: arguments in, calls out."""

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

AT_ONCE = 512  # texts that are read before the first of them is answered
FILES = (*SUFFIXES, ".txt")  # what ends so and has no blanks was meant as a file
FOLDER = "what train wrote, or a sequence classification that transformers wrote"
DEVICE = "auto, cpu, cuda, cuda:1 or mps (default: auto)"
DATA = "a table, JSON lines, text<TAB>label lines, a folder or 'pattern.*' of one file a class"


def add_commands(command: Callable[..., Callable[..., object]]) -> None:
    """Give `ffn classify` its commands: command(name, run, summary, more, key) adds one and returns its
    `add_argument`."""
    usual = "It writes a new folder, out=FOLDER (default: runs/classify), whose config.toml lists every key."
    summary = "train on labelled text, from scratch or from a pretrained model"
    add = command("train", _train, summary, usual, "train.epochs=3")
    words = f"{DATA}; a TOML file; keys such as train.epochs=3 and out=FOLDER"
    add("words", nargs="*", metavar="DATA CONFIG key=value", help=words)
    base = "a pretrained model: a run, a model's folder, or one of Hugging Face"
    add("--from", dest="base", metavar="PATH", help=base)

    summary = "how good a trained classifier is on labelled text"
    add = command("eval", _eval, summary, key="data.label=stars")
    add("folder", help=FOLDER)
    add("words", nargs="+", metavar="DATA key=value", help=f"{DATA}; keys such as data.label=stars")
    add("--predictions", metavar="FILE", help="write what was predicted, the worst mistakes first")
    add("--device", default="auto", help=DEVICE)

    add = command("predict", _predict, "the class of texts", key="data.text=review")
    add("folder", help=FOLDER)
    texts = "texts; or one file of them, and keys such as data.text=review; or - for standard input"
    add("words", nargs="+", metavar="TEXT", help=texts)
    add("--table", action="store_true", help="lines to read rather than JSON lines")
    add("--device", default="auto", help=DEVICE)

    add = command("export", _export, "write it as a sequence-classification model of transformers")
    add("folder", help="what train wrote")
    add("out", help="a new folder")


def _sort_words(words: Iterable[str]) -> tuple[str | None, str | None, list[str]]:
    """The data, the TOML file and the key=value among the words; ValueError for two of the first."""
    words = list(words)
    keys = [word for word in words if "=" in word and not os.path.exists(word)]  # noqa: PTH110 - as below
    files = [word for word in words if word not in keys and word.endswith(".toml")]
    data = [word for word in words if word not in keys and word not in files]
    for found, what in ((data, "DATA; put a pattern in quotes"), (files, "config")):
        if len(found) > 1:
            raise ValueError(f"{' '.join(found[:3])}: wants one {what}")
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
        raise ValueError(
            "eval wants the folder of a classifier, DATA, and then keys such as data.label=stars"
        )
    table = None if arguments.predictions is None else Path(arguments.predictions)
    if table is not None and (not table.parent.is_dir() or table.resolve() == Path(data).resolve()):
        raise ValueError(f"--predictions {table}: wants a file of its own in a folder that is there")
    numbers = not classifier.classes
    rows = read_data(config, data, _complain, numbers=numbers)
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
    print(f"saved        {arguments.out}: transformers' AutoModelForSequenceClassification reads it")
    return 0


def _load(arguments: argparse.Namespace) -> TextClassifier:
    device, _ = choose_device(arguments.device)
    return load_classifier(arguments.folder, device)


def _predictions(classifier: TextClassifier, texts: Iterable[str]) -> torch.Tensor:
    rows, cut = classifier.encode(texts)
    if cut:
        _complain(f"warning: {cut:,} of {len(rows):,} texts are cut to {classifier.encode.window} tokens")
    return classifier.predict_rows(rows)


def _texts(words: list[str], folder: str) -> Iterator[str]:
    """The texts that are given, in a file, or on standard input, a line each."""
    first, rest = words[0], words[1:]
    if words == ["-"]:
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(encoding="utf-8-sig", errors="surrogateescape")
        yield from _checked(("standard input", n, line) for n, line in enumerate(sys.stdin, 1))
    elif os.path.isfile(first):  # noqa: PTH113 - Path's raises where a text is too long for a name
        if other := [word for word in rest if not word.startswith("data.")]:
            raise ValueError(f"{other[0]}: behind the file {first} wants keys of data, as data.text=review")
        yield from read_data(read_data_config(folder, rest), first, _complain, labels=False).texts
    elif not rest and len(first.split()) == 1 and _looks_like_a_file(first):
        raise ValueError(f"{first}: no such file; to take it as a text give it on standard input, as -")
    else:
        yield from _checked(("text", number, text) for number, text in enumerate(words, 1))


def _looks_like_a_file(word: str) -> bool:
    return os.path.isdir(word) or word.lower().endswith(FILES)  # noqa: PTH112 - as above


def _checked(texts: Iterable[tuple[str, int, str]]) -> Iterator[str]:
    for source, number, text in texts:
        if not text.strip():
            raise ValueError(f"{source}:{number}: an empty text")
        if SURROGATE.search(text):
            raise ValueError(f"{source}:{number}: not utf-8; a file of another encoding is read as a file")
        yield text.rstrip("\r\n")


def _chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    """So many at a time, one where a person types; what stood before a mistake is answered before it."""
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
    """One line: what was predicted (a number, or a probability a class) of a text."""
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


def _complain(line: str) -> None:
    print(line, file=sys.stderr)
