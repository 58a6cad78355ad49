"""Format rows of cells as lines of plain text with aligned columns."""

import unicodedata
from collections.abc import Sequence


def columns(rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Return one line per row; columns are as wide as their widest cell, the first `left` are left-aligned.

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
    """Return the number of screen columns of a text; a Chinese character takes two."""
    return sum(1 + (unicodedata.east_asian_width(character) in "WF") for character in text)
