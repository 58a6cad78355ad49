"""List significant changes of speed between two files of rows.

python -m benchmarks compare A.jsonl B.jsonl

Cases are compared by their speedup over the baseline of the same run, because times of different hours are
not comparable. The newest row of each case counts, from the machine of the file's last row. A case changed if
the two 95% intervals do not overlap and the speedups differ by more than 5%: each interval is of one process,
and the memory layout of a process moves its times for its whole life.
"""

from pathlib import Path

from benchmarks.cases import BASELINE, CEILING
from benchmarks.report import CASE, arguments, newest, read, table

COLUMNS = [*CASE, "before", "after", "change"]
LEAST_CHANGE = 1.05  # as a ratio, either way


def rows_of(file: Path) -> dict[tuple, dict]:
    """Return the newest row of each case that was timed against a baseline, from the file's last machine.

    Raises:
        ValueError: if the file does not exist or has no rows.
    """
    try:
        rows = read(file)
        timed = [row for row in rows if {"speedup", "low", "high"} <= row.keys() and compared(row)]
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: no rows of a benchmark: {error}") from None
    if not rows:
        raise ValueError(f"{file}: no rows of a benchmark")
    return {tuple((key, row[key]) for key in CASE if key in row): row for row in newest(timed)}


def compared(row: dict) -> bool:
    return row.get("implementation") not in (BASELINE, CEILING)


def changed(before: dict[tuple, dict], after: dict[tuple, dict]) -> list[dict]:
    """Return a row per common case with a significant change of speedup, the worst first."""
    moved = []
    for case, old in before.items():
        new = after.get(case)
        if new is None:
            continue
        change = new["speedup"] / old["speedup"]
        apart = new["low"] > old["high"] or new["high"] < old["low"]
        if apart and max(change, 1 / change) > LEAST_CHANGE:
            was, now = (f"{row['speedup']:.2f} [{row['low']:.2f}, {row['high']:.2f}]" for row in (old, new))
            moved.append({**dict(case), "before": was, "after": now, "change": change})
    return sorted(moved, key=lambda row: row["change"])


def main(argv: list[str]) -> None:
    parser = arguments("compare", __doc__, keeps_rows=False)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    options = parser.parse_args(argv)
    try:
        before, after = rows_of(options.before), rows_of(options.after)
    except ValueError as error:
        raise SystemExit(f"python -m benchmarks compare: {error}") from None
    moved, both = changed(before, after), len(before.keys() & after.keys())
    if moved:
        print(table(moved, COLUMNS) + "\n")
    faster = sum(row["change"] > 1 for row in moved)
    print(f"{faster} faster, {len(moved) - faster} slower, {both - len(moved)} within the noise", end="")
    print(f"; {len(before) + len(after) - 2 * both} cases are in one file only")
