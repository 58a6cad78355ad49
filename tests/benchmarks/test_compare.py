"""compare: significant changes between two files of rows."""

import json
from pathlib import Path

import pytest

from benchmarks.compare import main


def row(case: str, speedup: float, spread: float = 0.1, **more: object) -> dict:
    ends = {"low": speedup - spread, "high": speedup + spread}
    return {"case": case, "implementation": "ffn", "speedup": speedup, **ends, **more}


def write(file: Path, *rows: dict) -> str:
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(file)


def test_change_needs_separate_intervals(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    before = write(tmp_path / "a.jsonl", row("up", 1.0), row("down", 2.0), row("same", 1.0), row("gone", 1.0))
    after = write(tmp_path / "b.jsonl", row("up", 1.3), row("down", 1.7), row("same", 1.19), row("new", 1.0))
    main([before, after])
    *lines, _, verdict = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| down", "| up"]
    assert "| 1.00 [0.90, 1.10] | 1.30 [1.20, 1.40] | 1.3 |" in lines[-1]
    assert verdict == "1 faster, 1 slower, 1 within the noise; 2 cases are in one file only"


def test_change_needs_five_percent(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    speedups = {"a": 1.04, "b": 0.96, "c": 1.06, "d": 0.94}
    before = write(tmp_path / "a.jsonl", *(row(case, 1.0, 0.001) for case in speedups))
    after = write(tmp_path / "b.jsonl", *(row(case, now, 0.001) for case, now in speedups.items()))
    main([before, after])
    *lines, _, verdict = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| d", "| c"]
    assert verdict.startswith("1 faster, 1 slower, 2 within the noise")


def test_newest_row_of_a_case_counts(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    before = write(tmp_path / "a.jsonl", row("x", 9.0), row("x", 1.0, dropout=0.1), row("x", 1.0))
    after = write(tmp_path / "b.jsonl", row("x", 1.0), row("x", 3.0, dropout=0.1), {"case": "x"})
    main([before, after])
    assert "1 faster, 0 slower, 1 within the noise; 0 cases" in capsys.readouterr().out


def test_baseline_and_ceiling_are_not_compared(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    files = []
    for name, speedup in (("a", 1.0), ("b", 2.0)):
        rows = [row("x", speedup) | {"implementation": each} for each in ("ceiling", "ffn", "torch")]
        files.append(write(tmp_path / name, *rows))
    main(files)
    assert capsys.readouterr().out.count("\n| ") == 1


def test_every_column_of_a_case_tells_cases_apart(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    block = {"block": "gpt2", "tokens": 16, "dtype": "float32", "work": "training", "dropout": 0.0}
    decoder = {"shape": "gpt2", "batch": 8, "dtype": "float32", "work": "generation", "dropout": 0.0}
    cases = [block, decoder]
    for case in (block, decoder):
        cases += [{**case, key: "another"} for key in (*case, "implementation")]
    before = write(tmp_path / "a.jsonl", *(row("", 1.0, **case) for case in cases))
    after = write(tmp_path / "b.jsonl", *(row("", 2.0 + i, **case) for i, case in enumerate(cases)))
    main([before, after])
    *lines, _, verdict = capsys.readouterr().out.splitlines()
    assert verdict == f"{len(cases)} faster, 0 slower, 0 within the noise; 0 cases are in one file only"
    assert [line.split(" | ")[-1] for line in lines[2:]] == [f"{2 + i} |" for i in range(len(cases))]


def test_file_without_rows_exits(tmp_path: Path) -> None:
    good = write(tmp_path / "a.jsonl", row("x", 1.0))
    for name, text in {"words": "words\n", "empty": "", "list": "[1]\n[2]\n"}.items():
        (tmp_path / name).write_text(text)
    for bad in (tmp_path / name for name in ("words", "empty", "list", "absent")):
        with pytest.raises(
            SystemExit, match=rf"^python -m benchmarks compare: {bad}: no rows of a benchmark"
        ):
            main([good, str(bad)])
