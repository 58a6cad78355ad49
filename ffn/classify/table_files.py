"""Read rows of text and label from files: tables, JSON lines, `text<TAB>label`, one file or folder per class.

Each row carries its file and its first line; each error message names them.
"""

from __future__ import annotations

import csv
import difflib
import glob
import io
import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

FORMATS = ("csv", "tsv", "jsonl", "tab", "lines")
SUFFIXES = {".csv": "csv", ".tsv": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl"}
LINE_END = re.compile("\r\n|\r|\n")  # str.splitlines would split at seven more characters
SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can spell these, UTF-8 cannot

Row = tuple[Path, int, str, str]  # file, line (from 1), text, label; "" without labels


def read_rows(
    path: str | Path, text: str, label: str | None, format: str | None, encoding: str, quotes: bool
) -> Iterator[Row]:
    """Yield the rows of a file, a folder or a pattern; the arguments are those of `read_labelled`."""
    if format is not None and format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {short(format)}")
    root = Path(path).expanduser()
    if root.is_dir():
        files = _shown(root)
    else:
        files = [root] if root.exists() else sorted(map(Path, glob.glob(str(root))))  # noqa: PTH207
    if not files:
        raise ValueError(f"{path}: no such file, no files in such a folder, no file matches such a pattern")
    if len(files) == 1 and not files[0].is_dir() and not root.is_dir():
        return _rows_of_file(files[0], text, label, format, encoding, quotes)
    if format is not None:
        raise ValueError(
            f"format={format} applies to one file, but {path} has one file per class; leave it out"
        )
    if len({file.is_dir() for file in files}) > 1:
        stray = next(file for file in files if not file.is_dir())
        raise ValueError(
            f"{path}: {stray.name} is a file beside folders; give one file per class or one folder per class"
        )
    return _rows_of_folders(files, encoding) if files[0].is_dir() else _rows_of_classes(files, encoding)


def _rows_of_classes(files: list[Path], encoding: str) -> Iterator[Row]:
    names = [file.stem for file in files]
    if len({*names}) < len(files):
        suffixes = [file.suffix[1:] for file in files]
        names = suffixes if len({*names}) == 1 and all(suffixes) else [file.name for file in files]
    for file, name in zip(files, names, strict=True):
        if file.suffix.lower() in SUFFIXES:
            raise ValueError(
                f"{file}: a table among files of one class each; give the path of the table instead"
            )
        lines = _lines(_read(file, encoding))
        if not lines:
            raise ValueError(f"{file}: the file is empty; the file of a class needs texts, one per line")
        yield from ((file, line, words, name) for line, words in enumerate(lines, 1))


def _rows_of_folders(folders: list[Path], encoding: str) -> Iterator[Row]:
    for folder in folders:
        files = _shown(folder)
        if not files or any(file.is_dir() for file in files):
            raise ValueError(f"{folder}: the folder of a class must hold files, one per text, and no folders")
        for file in files:
            yield file, 1, LINE_END.sub("\n", _read(file, encoding)).rstrip("\n"), folder.name


def _rows_of_file(
    file: Path, text: str, label: str | None, format: str | None, encoding: str, quotes: bool
) -> Iterator[Row]:
    content = _read(file, encoding)
    columns = [text] if label is None else [text, label]
    format = format or SUFFIXES.get(file.suffix.lower()) or _guess(content, columns)
    if format == "lines" and label is not None:
        raise ValueError(
            f"{file}:1: no labels found: no header with {text!r} and {label!r}, no JSON, no tab; "
            f"give format={'|'.join(FORMATS[:-1])}, or a folder with one file per class"
        )
    if format == "lines":
        found = ((line, [words]) for line, words in enumerate(_lines(content), 1))
    elif format == "tab":
        found = _tab_rows(file, content)
    elif format == "jsonl":
        found = _json_rows(file, content, columns)
    else:
        found = _table_rows(file, content, columns, format, quotes)
    for line, cells in found:
        yield file, line, cells[0], "" if label is None else cells[1]


def _guess(content: str, columns: list[str]) -> str:
    """Guess the format from the first line: a JSON object, a header with these columns, a tab, or none."""
    first = _first_line(content)
    if first.startswith("{"):
        return "jsonl"
    for format, delimiter in (("tsv", "\t"), ("csv", ","), ("csv", ";")):
        cells = [cell.strip(' "') for cell in first.split(delimiter)]
        if len(columns) > 1 and {*columns} <= {*cells}:  # a single word may be a text
            return format
    return "tab" if "\t" in first else "lines"


def _tab_rows(file: Path, content: str) -> Iterator[tuple[int, list[str]]]:
    for line, words in enumerate(_lines(content), 1):
        if "\t" in words:
            yield line, words.rsplit("\t", 1)
        elif words.strip():
            raise ValueError(
                f"{file}:{line}: no tab; each line must be text<TAB>label, or give another format="
            )


def _json_rows(file: Path, content: str, columns: list[str]) -> Iterator[tuple[int, list[str]]]:
    for line, words in enumerate(_lines(content), 1):
        if not words.strip():
            continue
        try:
            row = json.loads(words, object_pairs_hook=_once)
        except (ValueError, RecursionError) as error:
            what = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
            raise ValueError(f"{file}:{line}: not JSON ({what}); each line must be a JSON object") from None
        if not isinstance(row, dict):
            raise ValueError(f"{file}:{line}: each line must be a JSON object, got {short(row)}")
        _check_names(file, line, [*row], columns)
        cells = [row[name] for name in columns]
        if not isinstance(cells[0], str):
            raise ValueError(f"{file}:{line}: {columns[0]} must be a string, got {short(cells[0])}")
        if cells[-1] is None or isinstance(cells[-1], dict | list) or _is_nan(cells[-1]):
            raise ValueError(f"{file}:{line}: {columns[-1]} must be a label, got {short(cells[-1])}")
        if broken := [cell for cell in cells if isinstance(cell, str) and SURROGATE.search(cell)]:
            raise ValueError(f"{file}:{line}: half of a surrogate pair in {short(broken[0])}")
        yield line, [cell if isinstance(cell, str) else json.dumps(cell) for cell in cells]


def _is_nan(cell: object) -> bool:
    return isinstance(cell, float) and math.isnan(cell)


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError("a key occurs twice")
    return row


def _table_rows(
    file: Path, content: str, columns: list[str], format: str, quotes: bool
) -> Iterator[tuple[int, list[str]]]:
    first = _first_line(content)
    delimiter = "\t" if format == "tsv" else ";" if ";" in first and "," not in first else ","
    quoting = csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE
    csv.field_size_limit(
        max(csv.field_size_limit(), len(content))
    )  # a setting of the process; only raised, never lowered
    lines = io.StringIO(content, newline="")
    records = _records(file, csv.reader(lines, delimiter=delimiter, quoting=quoting, strict=True))
    line, header = next(records, (1, []))
    header = [name.strip() for name in header]
    _check_names(
        file, line, header, columns, "; for a file without a header give format=tab" * (format == "tsv")
    )
    places = [header.index(name) for name in columns]
    for line, cells in records:
        if len(cells) != len(header):
            raise ValueError(
                f"{file}:{line}: {len(cells)} cells where the header has {len(header)}; "
                f"put quotes around a text that holds {delimiter!r} or a line end"
            )
        yield line, [cells[place] for place in places]


def _records(file: Path, reader: Iterator[list[str]]) -> Iterator[tuple[int, list[str]]]:
    """Yield each record's first line and cells; skip blank lines."""
    while True:
        line = reader.line_num + 1  # type: ignore[attr-defined]
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            what = str(error).replace("\t", "\\t")
            raise ValueError(f"{file}:{line}: {what}; quotes=false reads quotes as text") from None
        if cells:
            yield line, cells


def _check_names(file: Path, line: int, names: list[str], columns: list[str], remedy: str = "") -> None:
    for column in columns:
        if column not in names:
            left = [name for name in names if name not in columns]
            there = listing(names, column, left)
            raise ValueError(f"{file}:{line}: no column {short(column)}; there are {there}{remedy}")
        if names.count(column) > 1:
            raise ValueError(f"{file}:{line}: {short(column)} occurs twice in the header")


def _read(file: Path, encoding: str) -> str:
    content = file.read_bytes()
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        line = _line_at(content[: error.start].decode(encoding, "replace"))
        raise ValueError(
            f"{file}:{line}: not {encoding}: byte 0x{content[error.start]:02x}, {error.reason}; "
            "give the file's encoding, as in encoding=latin-1 or utf-16"
        ) from None
    except LookupError as error:
        raise ValueError(f"encoding: {error}; examples: utf-8, latin-1, gb18030") from None
    if "\0" in text:
        line = _line_at(text[: text.index("\0")])
        raise ValueError(
            f"{file}:{line}: a NUL character; perhaps encoding=utf-16, or a file that is not text"
        )
    return text.removeprefix("\ufeff")


def _line_at(before: str) -> int:
    return 1 + len(LINE_END.findall(before))


def _lines(content: str) -> list[str]:
    """Return the lines of a text without empty lines at its end."""
    content = content.rstrip("\r\n")
    return LINE_END.split(content) if content else []


def _first_line(content: str) -> str:
    return LINE_END.split(content.lstrip("\r\n"), maxsplit=1)[0]


def _shown(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if not file.name.startswith("."))


def short(value: object) -> str:
    """Return a value from a file, quoted on one line, truncated to 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def listing(names: Sequence[str], wrong: str, candidates: Sequence[str]) -> str:
    """List at most ten names, then the candidate closest to the wrong name."""
    shown = ", ".join(map(short, names[:10])) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
    folded = {name.casefold(): name for name in candidates}
    close = [*candidates] if len(candidates) == 1 else difflib.get_close_matches(wrong.casefold(), folded, 1)
    meant = f"; did you mean {short(folded.get(close[0], close[0]))}?" if close else ""
    return (shown or "none") + meant
