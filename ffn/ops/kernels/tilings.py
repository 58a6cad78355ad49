"""Tile sizes of the fused matmul + activation kernels: a table of the measured cases.

`python -m benchmarks tune` measures and writes the table. A case that is absent, or null because fusion was
slower, is not fused: torch runs the matmul, then one pass follows.
"""

import json
from functools import cache
from pathlib import Path
from typing import NamedTuple

TABLE = Path(__file__).with_name("tilings.json")


class Tiling(NamedTuple):
    """Tile sizes and launch options of a fused product.

    rows, cols: a tile of the result. depth: of one step along the summed dimension. group: tile rows that
    share the weights in cache. parts: pieces in which the tile is finished. warps, stages: of a program. All
    but group and stages are powers of two.
    """

    rows: int
    cols: int
    depth: int
    group: int
    parts: int
    warps: int
    stages: int


def key(forward: bool, capability: tuple[int, int], dtype: str, gated: bool, D: int, H: int, N: int) -> str:
    """Return the name of a case in the table, with N rounded down to a power of two."""
    form = f"{'forward' if forward else 'backward'} {'gated' if gated else 'plain'}"
    return f"{form} sm{capability[0]}{capability[1]} {dtype} D{D} H{H} N{max(N, 1).bit_length() - 1}"


def _row(row: dict[str, int] | None) -> Tiling | None:
    if row is None:
        return None
    if not all(type(n) is int and n > 0 for n in row.values()):
        raise ValueError(f"tiling must be positive integers, got {row}")
    tiling = Tiling(**row)
    powers = (tiling.rows, tiling.cols, tiling.depth, tiling.parts, tiling.warps)
    if any(n & (n - 1) for n in powers):
        raise ValueError(f"tiling must be powers of two except group and stages, got {row}")
    return tiling


@cache
def _measured() -> dict[str, Tiling | None]:
    if not TABLE.exists():
        return {}
    try:
        return {name: _row(row) for name, row in json.loads(TABLE.read_text()).items()}
    except (ValueError, TypeError, AttributeError) as error:
        remedy = "rewrite it with `python -m benchmarks tune`, or delete it"
        raise ValueError(f"{TABLE} must be a table of tilings, got {error}: {remedy}") from error


def choose(
    forward: bool, capability: tuple[int, int], dtype: str, gated: bool, D: int, H: int, N: int
) -> Tiling | None:
    """Return the tiling of the fused product, or None if product and pass run unfused.

    Raises:
        ValueError: the table on disk is damaged.
    """
    return _measured().get(key(forward, capability, dtype, gated, D, H, N))


def to_json(table: dict[str, Tiling | None]) -> str:
    """Return the text of a table, to write to `TABLE`."""
    rows = {name: None if tiling is None else tiling._asdict() for name, tiling in sorted(table.items())}
    return json.dumps(rows, indent=1) + "\n"
