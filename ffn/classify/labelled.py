"""Labelled text in, splits out: tables, JSON lines, `text<TAB>label` lines, a folder of classes.

    rows = read_labelled("reviews.csv", text="review", label="stars")
    train, val, test = split(rows, (0.8, 0.1, 0.1), seed=0)
    numbers, classes = encode_labels(train)

What cannot be read raises ValueError: one line that names the file and the line in it. Texts are kept as
they stand, labels lose the blanks around them. Nothing is left out but blank lines between rows that hold a
label, line ends at the end of a file, hidden files of a folder, and what the caller asks to skip.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from ffn.classify.table_files import listing, read_rows, short


@dataclass(frozen=True)
class Labelled:
    """N texts with their labels and places."""

    texts: tuple[str, ...]
    labels: tuple[str, ...] | tuple[float, ...]  # floats where numbers were asked for; () where none were
    where: tuple[tuple[Path, int], ...]  # file and line, from 1, where each row begins
    skipped: tuple[tuple[Path, int], ...] = ()  # the rows without a text that were left out, as asked

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: Iterable[int]) -> Labelled:
        """These rows, in this order."""
        rows = list(rows)
        labels = tuple(self.labels[row] for row in rows) if self.labels else ()
        texts, where = tuple(self.texts[row] for row in rows), tuple(self.where[row] for row in rows)
        return Labelled(texts, labels, where)  # type: ignore[arg-type]


def read_labelled(
    path: str | Path,
    text: str = "text",
    label: str | None = "label",
    *,
    format: str | None = None,
    encoding: str = "utf-8",
    quotes: bool = True,
    numbers: bool = False,
    skip_empty: bool = False,
) -> Labelled:
    """Read labelled text from a file, a folder, or what a pattern such as `data/rt-polarity.*` matches.

    A folder, or a pattern that matches several files, is one file a class, one text a line; the class is the
    file's name without its suffix (or the suffix, where only suffixes differ). A folder of folders is one
    folder a class, one file a text.

    Args:
        text, label: names of columns, or keys. label=None reads texts alone.
        format: "csv" or "tsv", with a header; "jsonl", an object a line; "tab", text<TAB>label lines, where
            the last tab counts; "lines", texts alone. Left out, the suffix decides, else the first line.
        encoding: of all files; a byte order mark in front of UTF-8 is dropped.
        quotes: a quote that opens a cell of a table means one, so that the cell may hold line ends.
        numbers: labels are finite numbers, for regression.
        skip_empty: leave out rows whose text is empty or blank, listed in `skipped`; else they are refused.

    Raises ValueError for anything else that stands in the files, OSError for files that cannot be opened.
    """
    texts, labels, where, skipped = [], [], [], []
    for file, line, words, name in read_rows(path, text, label, format, encoding, quotes):
        if not words.strip():
            if not skip_empty:
                raise ValueError(f"{file}:{line}: an empty text; take the row out, or give skip_empty=true")
            skipped.append((file, line))
            continue
        if label is not None:
            labels.append(_label(file, line, name.strip(), numbers))
        texts.append(words)
        where.append((file, line))
    if not texts:
        raise ValueError(f"{path}: no texts in it")
    return Labelled(tuple(texts), tuple(labels), tuple(where), tuple(skipped))


def split(
    rows: Labelled, fractions: Sequence[float] = (0.8, 0.1, 0.1), seed: int = 0
) -> tuple[Labelled, ...]:
    """Divide rows into splits, class by class, by a hash of seed and text.

    Equal texts (surrounding blanks ignored) land in one split, so splits never overlap. The fractions apply
    to the distinct texts of each class, rounded. A class with at least as many distinct texts as there are
    splits appears in every split; a smaller class appears in the first split alone. The split of a text
    depends on the seed and on the set of (text, label), not on the order of the rows. Rows keep their order
    within a split. Numeric labels count as one class.

    Raises:
        ValueError: `fractions` do not sum to 1, or a split would stay empty.
    """
    if len(fractions) < 2 or min(fractions) <= 0 or not math.isclose(sum(fractions), 1.0, abs_tol=1e-6):
        raise ValueError(f"fractions: wants two or more above 0 that sum to 1; got {tuple(fractions)}")
    classes: dict[str, str] = {}
    for row, words in enumerate(map(str.strip, rows.texts)):
        name = rows.labels[row] if rows.labels else ""
        name = name if isinstance(name, str) else ""
        classes[words] = min(name, classes.get(words, name))  # a text with two labels belongs to the first
    members: dict[str, list[str]] = {}
    for words, name in classes.items():
        members.setdefault(name, []).append(words)
    part: dict[str, int] = {}
    for texts in members.values():
        texts.sort(key=lambda words: hashlib.sha256(f"{seed}\n{words}".encode()).digest())
        sizes = _sizes(len(texts), fractions)
        part |= zip(texts, (i for i, size in enumerate(sizes) for _ in range(size)), strict=True)
    chosen: list[list[int]] = [[] for _ in fractions]
    for row, words in enumerate(rows.texts):
        chosen[part[words.strip()]].append(row)
    if not all(chosen):
        raise ValueError(
            f"{len(part)} different texts are too few for splits of {tuple(fractions)}; bring more"
        )
    return tuple(map(rows.take, chosen))


def overlap(train: Labelled, test: Labelled) -> int:
    """How many rows of `test` have a text that is in `train` as well, blanks around it aside."""
    known = {words.strip() for words in train.texts}
    return sum(words.strip() in known for words in test.texts)


def encode_labels(rows: Labelled, classes: Sequence[str] | None = None) -> tuple[Tensor, tuple[str, ...]]:
    """The numbers of the rows' classes, (N,) int64, and the names of the classes.

    Args:
        classes: the classes of a model, in its order. Left out they are those of the rows, sorted as text,
            or by value where all are whole numbers; two or more.

    Raises ValueError for a single class, and for a label that is not among `classes`, with its place.
    """
    if classes is None:
        names = {str(name) for name in rows.labels}
        whole = all(re.fullmatch("-?[0-9]{1,18}", name) for name in names)
        classes = sorted(names, key=lambda name: (int(name) if whole else 0, name))
        if len(classes) < 2:
            place = f"{rows.where[0][0]}: " if rows.where else ""
            raise ValueError(
                f"{place}wants two classes or more; got {', '.join(map(short, classes)) or 'none'}"
            )
    numbers = {name: number for number, name in enumerate(classes)}
    for (file, line), name in zip(rows.where, rows.labels, strict=True):
        if name not in numbers:
            known = f"the classes are {listing(classes, str(name), classes)}"
            raise ValueError(f"{file}:{line}: unknown label {short(name)}; {known}")
    return torch.tensor([numbers[str(name)] for name in rows.labels], dtype=torch.int64), tuple(classes)


def _label(file: Path, line: int, name: str, numbers: bool) -> str | float:
    if not name:
        raise ValueError(f"{file}:{line}: the label is missing")
    if not numbers:
        return name
    try:
        number = float(name)
    except ValueError:
        number = math.nan
    if not math.isfinite(number) or "_" in name:  # float() reads 1_000
        raise ValueError(f"{file}:{line}: wants a finite number as label; got {short(name)}")
    return number


def _sizes(count: int, fractions: Sequence[float]) -> list[int]:
    """`count` cut by fractions, to the nearest; none is 0 where there are enough, else the first has all."""
    if count < len(fractions):
        return [count, *(0 for _ in fractions[1:])]
    cuts = [round(count * share / sum(fractions)) for share in accumulate(fractions)]
    sizes = [cut - before for before, cut in zip([0, *cuts], cuts, strict=False)]
    while 0 in sizes:
        sizes[sizes.index(max(sizes))] -= 1
        sizes[sizes.index(0)] = 1
    return sizes
