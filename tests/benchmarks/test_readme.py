"""The tables of README.md and docs/measured.md equal those made from the committed rows."""

import json

import pytest

from benchmarks import readme
from benchmarks.readme import PAGES, README, of_the_block, rewritten

TABLES = [(page, make) for page, tables in PAGES.items() for make in tables]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_equal_the_rows(page) -> None:
    text = page.read_text("utf-8")
    assert rewritten(page, text) == text, "run `python -m benchmarks readme`"


@pytest.mark.parametrize(("page", "make"), TABLES)
def test_changed_and_missing_lines_are_restored(page, make) -> None:
    text, row = page.read_text("utf-8"), make()[2]
    label, _, numbers = row[2:].partition(" | ")
    changed = f"| {label} | " + numbers.translate(str.maketrans("0123456789", "1234567890"))
    assert rewritten(page, text.replace(row, changed)) == text
    assert rewritten(page, text.replace(row + "\n", "")) == text


def test_missing_or_duplicate_table_raises() -> None:
    text, head = README.read_text("utf-8"), of_the_block()[0]
    for other in (text.replace(head, ""), text + head + "\n"):
        with pytest.raises(
            ValueError, match=r"^README.md must have one table that begins with \| shape, tokens "
        ):
            rewritten(README, other)


def test_rows_of_a_case_are_from_its_last_timed_run(tmp_path, monkeypatch) -> None:
    case = {"block": "small", "tokens": 512, "dtype": "float32", "work": "training", "dropout": 0.0}

    def run(hour: int, **seconds: float | None) -> list[dict]:
        told = ({"ms": ms} if ms else {"note": "skipped"} for ms in seconds.values())
        stamp = case | {"time": f"2026-01-01T{hour:02}:00:00Z"}
        return [stamp | {"implementation": name} | found for name, found in zip(seconds, told, strict=True)]

    other = [row | {"tokens": 2048} for row in run(0, torch=8.0)]
    rows = [*run(1, torch=1.0, timm=2.0), *run(2, torch=3.0, ffn=4.0), *other, *run(3, torch=None, timm=None)]
    (tmp_path / "ffn.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    assert [(row["tokens"], row["implementation"], row["ms"]) for row in readme.timed("ffn")] == [
        (512, "torch", 3.0), (512, "ffn", 4.0), (2048, "torch", 8.0),
    ]  # fmt: skip
    assert {name for (name,) in readme.newest("ffn", ("implementation",), tokens=512)} == {"torch", "ffn"}
