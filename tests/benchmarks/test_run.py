"""Suites name existing cases and implementations and keep to their budget; finished rows are always kept."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import base, run, suites
from benchmarks.__main__ import main
from benchmarks.cases import BLOCKS, Case
from benchmarks.implementations import IMPLEMENTATIONS
from benchmarks.suites import SUITES, Job, narrowed

TOY = Case(replace(BLOCKS["gpt2"], dim=8, hidden_dim=16), tokens=4)
GATED = replace(TOY, block=replace(BLOCKS["qwen2.5-0.5b"], dim=8, hidden_dim=16))


def rows_of(folder: Path, suite: str) -> dict[tuple, dict]:
    rows = [json.loads(line) for line in (folder / f"{suite}.jsonl").read_text().splitlines()]
    return {(row["block"], row["implementation"]): row for row in rows}


def suite_of(monkeypatch: pytest.MonkeyPatch, name: str, *jobs: Job) -> None:
    monkeypatch.setitem(suites.SUITES, name, lambda: list(jobs))


@pytest.mark.parametrize("name", SUITES)
def test_suites_name_existing_implementations(name: str) -> None:
    jobs = SUITES[name]()
    assert {each for job in jobs for each in job.names} <= set(IMPLEMENTATIONS)
    assert all("torch" in job.names for job in jobs)
    for job in jobs:
        assert len(set(job.cases)) == len(job.cases) > 0


@pytest.mark.parametrize("name", ["quick", "ffn"])
def test_each_case_on_a_cpu_is_in_one_job(name: str) -> None:
    cases = [case for job in SUITES[name]() for case in job.cases]
    assert len(set(cases)) == len(cases)


def test_ffn_suite_has_every_block_and_the_suites_have_every_implementation() -> None:
    jobs = SUITES["ffn"]() + SUITES["gpu"]()
    assert {case.block.name for job in SUITES["ffn"]() for case in job.cases} == set(BLOCKS)
    assert {name for job in jobs for name in job.names} == set(IMPLEMENTATIONS) - {"ffn triton"}
    assert {case.tokens for job in jobs for case in job.cases} >= {1, 16, 512, 2048, 8192, 16384}


def test_only_and_dtype_narrow_a_suite() -> None:
    jobs = narrowed(SUITES["ffn"](), ["float32"], ["gpt2", "timm"])
    assert {case.block.name for job in jobs for case in job.cases} == {"gpt2"}
    assert {case.dtype for job in jobs for case in job.cases} == {"float32"}
    assert {name for job in jobs for name in job.names} == {"torch", "timm"}
    with pytest.raises(ValueError, match="--only gtp2"):
        narrowed(SUITES["ffn"](), ["float32"], ["gtp2"])
    with pytest.raises(ValueError, match="no case is left"):
        narrowed(SUITES["gpu"](), ["float32"], [])


def test_a_suite_writes_rows_a_table_and_a_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    suite_of(monkeypatch, "quick", Job((TOY, GATED), ("torch", "ffn", "timm"), seconds=0.0))
    assert main(["quick", "--device", "cpu", "--out", str(tmp_path)]) == 0
    rows = rows_of(tmp_path, "quick")
    assert len(rows) == 2 * 4, "one per implementation, and the ceiling"
    for (block, name), row in rows.items():
        assert {"torch", "threads", "cpu", "commit", "time"} <= row.keys()
        if name in ("torch", "ffn"):
            assert row["error"] < 1e-6, block
            assert row["low"] <= row["speedup"] <= row["high"]
    said = capsys.readouterr().out
    assert "| training | gpt2 | 4 | float32 | 0 | ffn |" in said
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")


def test_ctrl_c_keeps_the_finished_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    suite_of(monkeypatch, "quick", Job((TOY, GATED), ("torch", "ffn"), seconds=0.0))
    real = run.run_case

    def interrupted(case, *rest, **options):
        if case == GATED:
            raise KeyboardInterrupt
        return real(case, *rest, **options)

    monkeypatch.setattr(run, "run_case", interrupted)
    main(["quick", "--device", "cpu", "--out", str(tmp_path)])
    assert set(rows_of(tmp_path, "quick")) == {("gpt2", name) for name in ("torch", "ffn", "ceiling")}
    assert "stopped: 3 rows are in" in capsys.readouterr().err


def test_too_long_cases_get_a_row_with_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = replace(TOY, tokens=1 << 40)
    suite_of(monkeypatch, "quick", Job((long,), ("torch", "ffn"), seconds=0.0))
    main(["quick", "--device", "cpu", "--out", str(tmp_path)])
    rows = rows_of(tmp_path, "quick")
    assert {row["note"] for row in rows.values()} == {"skipped: a call would take seconds on a CPU"}
    assert {row["device"] for row in rows.values()} == {"cpu"}, "as the timed rows have it"


def test_cases_beyond_the_budget_get_a_row_with_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite_of(monkeypatch, "quick", Job((TOY,), ("torch", "ffn"), seconds=0.0))
    main(["quick", "--device", "cpu", "--budget", "1", "--out", str(tmp_path)])
    rows = rows_of(tmp_path, "quick")
    assert {row["note"] for row in rows.values()} == {"skipped: the budget of 1 s is spent"}


def test_end_of_a_gpu_job_loses_only_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dry run on the CPU: the first job runs in a real process, the second exceeds its time."""
    first, second, *_ = SUITES["gpu"]()
    second = replace(second, limit=16.0)
    monkeypatch.setattr(run, "narrowed", lambda jobs, *rest: [replace(first, names=("torch", "ffn")), second])
    real = run.subprocess.run

    def cut_off(command, **rest):
        if "--job" in command and command[command.index("--job") + 1] == "1":
            raise run.subprocess.TimeoutExpired(command, rest["timeout"])
        return real(command, **rest)

    monkeypatch.setattr(run.subprocess, "run", cut_off)
    words = f"--device cpu --only gpt2,ffn --out {tmp_path}"
    run.main("gpu", words.split())
    rows = rows_of(tmp_path, "gpu")
    assert rows["toy gpt2", "ffn"]["ms"] > 0
    assert (
        rows[f"toy {second.cases[0].block.name}", "ffn"]["note"]
        == "skipped: not done in the 16 s it was given"
    )


def test_base_passes_the_chosen_cases_on(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(base, "main", lambda *words, **options: asked.append((words, options)))
    rev = "HEAD~3"
    words = f"--device cpu --only minilm,ffn --dtype float32 --base {rev} --budget 9"
    run.main("ffn", words.split())
    ((asked_rev, cases, names), options) = asked[0]
    assert (asked_rev, names, options) == (rev, ["ffn"], {"device": "cpu", "budget": 9.0})
    assert len(set(cases)) == len(cases) > 1
    assert {(case.block.name, case.dtype) for case in cases} == {("minilm", "float32")}
    monkeypatch.undo()
    with pytest.raises(SystemExit, match="--base nothing"):
        run.main("ffn", ["--device", "cpu", "--base", "nothing"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_suite_without_a_gpu_exits(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        run.main("gpu", [])
    assert "torch sees no GPU" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["quick", "decoder"])
def test_invalid_options_exit_before_anything_runs(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    invalid = [("--out", str(file / "rows")), ("--dtype", "float32,float8"), ("--device", "tpu")]
    if not torch.cuda.is_available():
        invalid += [("--device", "cuda")]
    if name == "decoder":
        invalid += [("--rounds", "0"), ("--new-tokens", "0"), ("--only", "tiny,gpt3")]
    for words in invalid:
        with pytest.raises(SystemExit):
            main([name, *words])
        assert f"error: argument {words[0]}: " in capsys.readouterr().err
    assert file.read_text() == "mine"


def test_unknown_names_exit_and_help_lists_the_names(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["qiuck"]) == 2
    assert "quick, ffn, gpu, decoder" in capsys.readouterr().err
    suite_of(monkeypatch, "quick", Job((TOY,), ("torch",)))
    assert main(["-h"]) == 0
    assert "decoder  " in capsys.readouterr().out
    with pytest.raises(SystemExit, match="--only nothing"):
        main(["--device", "cpu", "--only", "nothing"])
    assert sys.modules["benchmarks.run"] is run
