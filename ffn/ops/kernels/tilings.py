"""Which product is fused with what lies behind it, and in which tiles: a table, and defaults off the table.

Nothing is measured when the block is called; `python -m benchmarks tune` measures and writes the table.
"""

import json
from functools import cache
from pathlib import Path
from typing import NamedTuple

TABLE = Path(__file__).with_name("tilings.json")


class Tiling(NamedTuple):
    """A tile of the result (rows, cols), the depth of one step, and how a program is run.

    group: tile rows that share the weights in cache. parts: pieces the tile is finished in.
    All but group and stages are powers of two.
    """

    rows: int
    cols: int
    depth: int
    group: int
    parts: int
    warps: int
    stages: int


# Large tiles that compile without spilling, asserted ahead of time; by the first number of the compute
# capability, then by (forward, gated). A tile takes so much writing to finish that, but for the two sums of
# the gated forward, two programs share a processor: one is in its product while the other finishes. Newer
# devices than these have too little shared memory.
_LARGE = {
    (True, False): Tiling(128, 128, 64, 8, 4, 8, 3),
    (True, True): Tiling(128, 128, 64, 8, 4, 8, 4),
    (False, False): Tiling(128, 128, 64, 8, 8, 8, 3),
    (False, True): Tiling(128, 128, 64, 8, 8, 8, 3),
}
DEFAULTS = {9: _LARGE, 10: _LARGE}
# Estimates, unmeasured. Up to which D the saved passes are worth more than the library's faster product, by
# (forward, gated): the gated forward has a processor to itself, so nothing runs while a tile is finished.
FUSE_UP_TO = {(True, False): 2048, (True, True): 1024, (False, False): 2048, (False, True): 2048}
# Fewer elements than two tiles for each of an H100's processors leave some idle, and the launch costs more.
FEWEST = 2 * 132 * 128 * 128


def key(forward: bool, capability: tuple[int, int], dtype: str, gated: bool, D: int, H: int, N: int) -> str:
    """The name of a case in the table; token counts go by their power of two."""
    form = f"{'forward' if forward else 'backward'} {'gated' if gated else 'plain'}"
    return f"{form} sm{capability[0]}{capability[1]} {dtype} D{D} H{H} N{max(N, 1).bit_length() - 1}"


def _row(row: dict[str, int] | None) -> Tiling | None:
    if row is None:
        return None
    if not all(type(n) is int and n > 0 for n in row.values()):
        raise ValueError(f"want counts, got {row}")
    tiling = Tiling(**row)
    powers = (tiling.rows, tiling.cols, tiling.depth, tiling.parts, tiling.warps)
    if any(n & (n - 1) for n in powers):
        raise ValueError(f"all but group and stages are powers of two, got {row}")
    return tiling


@cache
def _measured() -> dict[str, Tiling | None]:
    if not TABLE.exists():
        return {}
    try:
        return {name: _row(row) for name, row in json.loads(TABLE.read_text()).items()}
    except (ValueError, TypeError, AttributeError) as error:
        remedy = "write it anew with `python -m benchmarks tune`, or delete it"
        raise ValueError(f"{TABLE} is no table of tilings ({error}): {remedy}") from error


def choose(
    forward: bool, capability: tuple[int, int], dtype: str, gated: bool, D: int, H: int, N: int
) -> Tiling | None:
    """The tiling of the fused product, or None where product and pass run one after the other.

    Raises:
        ValueError: the table on disk is damaged.
    """
    name = key(forward, capability, dtype, gated, D, H, N)
    measured = _measured()
    if name in measured:
        return measured[name]
    narrow = dtype in ("bfloat16", "float16")
    if not narrow or N * H < FEWEST or FUSE_UP_TO[forward, gated] < D or capability[0] not in DEFAULTS:
        return None
    return DEFAULTS[capability[0]][forward, gated]


def to_json(table: dict[str, Tiling | None]) -> str:
    """The text of a table, for `TABLE`."""
    rows = {name: None if tiling is None else tiling._asdict() for name, tiling in sorted(table.items())}
    return json.dumps(rows, indent=1) + "\n"
