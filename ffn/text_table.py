"""Rows of cells as lines of plain text, in columns."""

import unicodedata
from collections.abc import Sequence


def columns(rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """A line for each row, every column as wide as its widest cell; the first `left` begin at the left.

    >>> columns([("part", "size"), ("head", "1,024")])
    ['part   size', 'head  1,024']
    """
    widths = [max(map(_width, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        gaps = [" " * (width - _width(cell)) for cell, width in zip(row, widths, strict=True)]
        cells = [cell + gap for cell, gap in zip(row[:left], gaps[:left], strict=True)]
        cells += [gap + cell for cell, gap in zip(row[left:], gaps[left:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return lines


def _width(text: str) -> int:
    """The columns of a screen that a text takes, where Chinese characters take two."""
    return sum(1 + (unicodedata.east_asian_width(character) in "WF") for character in text)
