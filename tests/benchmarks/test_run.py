"""Suites name what exists and keep to their budget; rows are kept whatever happens."""

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
def test_suites_name_what_exists(name: str) -> None:
    jobs = SUITES[name]()
    assert {each for job in jobs for each in job.names} <= set(IMPLEMENTATIONS)
    assert all("torch" in job.names for job in jobs)
    for job in jobs:
        assert len(set(job.cases)) == len(job.cases) > 0


@pytest.mark.parametrize("name", ["quick", "ffn"])
def test_on_a_cpu_each_case_is_measured_in_one_job_so_that_its_rows_are_of_one_run(name: str) -> None:
    cases = [case for job in SUITES[name]() for case in job.cases]
    assert len(set(cases)) == len(cases)


def test_the_ffn_suite_has_every_block_and_the_gpu_suite_every_peer() -> None:
    jobs = SUITES["ffn"]() + SUITES["gpu"]()
    assert {case.block.name for job in SUITES["ffn"]() for case in job.cases} == set(BLOCKS)
    assert {name for job in jobs for name in job.names} == set(IMPLEMENTATIONS) - {"ffn triton"}
    assert {case.tokens for job in jobs for case in job.cases} >= {1, 16, 512, 2048, 8192, 16384}


def test_only_and_dtype_narrow_a_suite() -> None:
    jobs = narrowed(SUITES["ffn"](), ["float32"], ["gpt2", "timm"])
    assert {case.block.name for job in jobs for case in job.cases} == {"gpt2"}
    assert {case.dtype for job in jobs for case in job.cases} == {"float32"}
    assert {name for job in jobs for name in job.names} == {"torch", "timm"}
    with pytest.raises(ValueError, match="--only gtp2: not in this suite, which has bert-base"):
        narrowed(SUITES["ffn"](), ["float32"], ["gtp2"])
    with pytest.raises(ValueError, match="no case is left"):
        narrowed(SUITES["gpu"](), ["float32"], [])


def test_a_suite_leaves_rows_a_table_pictures_and_a_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    suite_of(monkeypatch, "quick", Job((TOY, GATED), ("torch", "ffn", "timm"), seconds=0.0))
    assert main(["quick", "--device", "cpu", "--out", str(tmp_path)]) == 0
    rows = rows_of(tmp_path, "quick")
    assert len(rows) == 2 * 4, "one of each, and the ceiling"
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


def test_what_takes_seconds_a_call_is_a_row_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = replace(TOY, tokens=1 << 40)
    suite_of(monkeypatch, "quick", Job((long,), ("torch", "ffn"), seconds=0.0))
    main(["quick", "--device", "cpu", "--out", str(tmp_path)])
    rows = rows_of(tmp_path, "quick")
    assert {row["note"] for row in rows.values()} == {"skipped: a call would take seconds on a CPU"}
    assert {row["device"] for row in rows.values()} == {"cpu"}, "as the timed rows have it"


def test_what_the_budget_does_not_reach_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suite_of(monkeypatch, "quick", Job((TOY,), ("torch", "ffn"), seconds=0.0))
    main(["quick", "--device", "cpu", "--budget", "1", "--out", str(tmp_path)])
    rows = rows_of(tmp_path, "quick")
    assert {row["note"] for row in rows.values()} == {"skipped: the budget of 1 s is spent"}


def test_on_a_gpu_each_job_has_a_process_whose_end_costs_only_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dry, on the CPU: the child sees the real suite, so the first job runs; the second is cut off."""
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


def test_base_compares_the_cases_with_another_commit(monkeypatch: pytest.MonkeyPatch) -> None:
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
    with pytest.raises(SystemExit, match="--base nothing wants a commit of"):
        run.main("ffn", ["--device", "cpu", "--base", "nothing"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        run.main("gpu", [])
    assert "torch sees no GPU; want cpu" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["quick", "decoder"])
def test_an_option_that_cannot_be_met_is_refused_before_anything_runs(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    refused = {("--out", str(file / "rows")): f"{file / 'rows'} wants a folder to write in; {file} is none"}
    refused["--dtype", "float32,float8"] = "float8: want any of float32, bfloat16, autocast"
    refused["--device", "tpu"] = "invalid choice: 'tpu'"
    if not torch.cuda.is_available():
        refused["--device", "cuda"] = "torch sees no GPU; want cpu"
    if name == "decoder":
        refused["--rounds", "0"] = refused["--new-tokens", "0"] = "want a number from 1 up; got 0"
        refused["--only", "tiny,gpt3"] = "gpt3: want any of training step, generation, tiny"
    for words, why in refused.items():
        with pytest.raises(SystemExit):
            main([name, *words])
        assert f"error: argument {words[0]}: {why}" in capsys.readouterr().err
    assert file.read_text() == "mine"


def test_the_door_names_what_there_is(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["qiuck"]) == 2
    assert "wants one of quick, ffn, gpu, decoder" in capsys.readouterr().err
    suite_of(monkeypatch, "quick", Job((TOY,), ("torch",)))
    assert main(["-h"]) == 0
    assert "decoder         whole models" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="--only nothing: not in this suite"):
        main(["--device", "cpu", "--only", "nothing"])
    assert sys.modules["benchmarks.run"] is run
