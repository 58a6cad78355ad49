"""Read labelled text and split it: tables, JSON lines, `text<TAB>label` lines, a folder of classes.

    rows = read_labelled("reviews.csv", text="review", label="stars")
    train, val, test = split(rows, (0.8, 0.1, 0.1), seed=0)
    numbers, classes = encode_labels(train)

Bad input raises ValueError with one line that names the file and the line in it. Texts are kept unchanged;
labels are stripped. Skipped are only blank lines between labelled rows, line ends at the end of a file,
hidden files of a folder, and with skip_empty=True rows without text.
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
    """N texts with their labels and their places in the files."""

    texts: tuple[str, ...]
    labels: tuple[str, ...] | tuple[float, ...]  # floats for regression; () without labels
    where: tuple[tuple[Path, int], ...]  # file and first line (from 1) of each row
    skipped: tuple[tuple[Path, int], ...] = ()  # rows without text, left out by skip_empty

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: Iterable[int]) -> Labelled:
        """Return these rows, in this order."""
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

    A folder, or a pattern that matches several files, holds one file per class with one text per line; the
    class is the file's name without its suffix (or the suffix, where only suffixes differ). A folder of
    folders holds one folder per class with one file per text.

    Args:
        text, label: names of columns or keys. label=None reads texts alone.
        format: "csv" or "tsv" with a header; "jsonl" with one object per line; "tab" with text<TAB>label
            lines, split at the last tab; "lines" with texts alone. By default the suffix decides, else the
            first line.
        encoding: of all files; a byte order mark before UTF-8 is dropped.
        quotes: True reads quotes around a table's cell as quoting, so the cell may hold line ends; False
            reads them as text.
        numbers: labels must be finite numbers, for regression.
        skip_empty: True lists rows with an empty or blank text in `skipped`; False raises an error.

    Raises:
        ValueError: the files hold anything else.
        OSError: a file cannot be opened.
    """
    texts, labels, where, skipped = [], [], [], []
    for file, line, words, name in read_rows(path, text, label, format, encoding, quotes):
        if not words.strip():
            if not skip_empty:
                raise ValueError(f"{file}:{line}: empty text; remove the row or give skip_empty=true")
            skipped.append((file, line))
            continue
        if label is not None:
            labels.append(_label(file, line, name.strip(), numbers))
        texts.append(words)
        where.append((file, line))
    if not texts:
        raise ValueError(f"{path}: no texts found")
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
        raise ValueError(
            f"fractions must be two or more positive numbers that sum to 1, got {tuple(fractions)}"
        )
    classes: dict[str, str] = {}
    for row, words in enumerate(map(str.strip, rows.texts)):
        name = rows.labels[row] if rows.labels else ""
        name = name if isinstance(name, str) else ""
        classes[words] = min(name, classes.get(words, name))  # a text with two labels counts for the first
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
        raise ValueError(f"{len(part)} distinct texts are too few for splits of {tuple(fractions)}; add more")
    return tuple(map(rows.take, chosen))


def overlap(train: Labelled, test: Labelled) -> int:
    """Count the rows of `test` with a text that `train` also has, surrounding blanks ignored."""
    known = {words.strip() for words in train.texts}
    return sum(words.strip() in known for words in test.texts)


def encode_labels(rows: Labelled, classes: Sequence[str] | None = None) -> tuple[Tensor, tuple[str, ...]]:
    """Return the class number of each row, (N,) int64, and the class names.

    Args:
        classes: class names of a model, in its order. By default those of the rows, sorted as text, or by
            value if all are whole numbers.

    Raises:
        ValueError: fewer than two classes, or a label that is not among `classes`.
    """
    if classes is None:
        names = {str(name) for name in rows.labels}
        whole = all(re.fullmatch("-?[0-9]{1,18}", name) for name in names)
        classes = sorted(names, key=lambda name: (int(name) if whole else 0, name))
        if len(classes) < 2:
            place = f"{rows.where[0][0]}: " if rows.where else ""
            got = ", ".join(map(short, classes)) or "none"
            raise ValueError(f"{place}the labels must name two classes or more, got {got}")
    numbers = {name: number for number, name in enumerate(classes)}
    for (file, line), name in zip(rows.where, rows.labels, strict=True):
        if name not in numbers:
            known = f"the classes are {listing(classes, str(name), classes)}"
            raise ValueError(f"{file}:{line}: unknown label {short(name)}; {known}")
    return torch.tensor([numbers[str(name)] for name in rows.labels], dtype=torch.int64), tuple(classes)


def _label(file: Path, line: int, name: str, numbers: bool) -> str | float:
    if not name:
        raise ValueError(f"{file}:{line}: no label")
    if not numbers:
        return name
    try:
        number = float(name)
    except ValueError:
        number = math.nan
    if not math.isfinite(number) or "_" in name:  # float() reads 1_000
        raise ValueError(f"{file}:{line}: the label must be a finite number, got {short(name)}")
    return number


def _sizes(count: int, fractions: Sequence[float]) -> list[int]:
    """Divide `count` by fractions, rounded; no size is 0, or with too few the first is `count`."""
    if count < len(fractions):
        return [count, *(0 for _ in fractions[1:])]
    cuts = [round(count * share / sum(fractions)) for share in accumulate(fractions)]
    sizes = [cut - before for before, cut in zip([0, *cuts], cuts, strict=False)]
    while 0 in sizes:
        sizes[sizes.index(max(sizes))] -= 1
        sizes[sizes.index(0)] = 1
    return sizes
