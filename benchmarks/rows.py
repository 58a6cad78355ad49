"""Read rows: finite numbers, groups, and the order of blocks."""

import math
from collections.abc import Iterable
from typing import Any

from benchmarks.cases import BLOCKS, DTYPES, WORKS


def number(row: dict, key: str) -> float | None:
    """Return the row's value if it is a finite number, else None."""
    value = row.get(key)
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if good else None


def positive(row: dict, key: str) -> bool:
    return (number(row, key) or 0) > 0


def timed(rows: Iterable[dict]) -> list[dict]:
    """Return the timed rows of blocks in the order of cases.py, then by tokens and dropout."""
    found = []
    for row in rows:
        if "shape" not in row and positive(row, "ms") and positive(row, "tokens"):
            words = {
                key: str(row.get(key, "unnamed")) for key in ("block", "dtype", "work", "implementation")
            }
            found.append(row | words | {"dropout": number(row, "dropout") or 0.0})
    orders = {"work": WORKS, "dtype": DTYPES, "block": tuple(BLOCKS)}

    def place(row: dict) -> tuple:
        known = [order.index(row[key]) if row[key] in order else len(order) for key, order in orders.items()]
        return *known, *(row[key] for key in orders), row["tokens"], row["dropout"]

    return sorted(found, key=place)


def split(rows: Iterable[dict], *keys: str) -> dict[Any, list[dict]]:
    """Group the rows by their values of the keys (of one key: by its value), in order of appearance."""
    groups: dict[Any, list[dict]] = {}
    for row in rows:
        values = tuple(row.get(key) for key in keys)
        groups.setdefault(values if len(keys) > 1 else values[0], []).append(row)
    return groups
