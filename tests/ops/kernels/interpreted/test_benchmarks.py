"""Benchmarks that need kernels run in the interpreter at toy sizes; their times are meaningless there."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import tune
from benchmarks.cases import BLOCKS, Case
from benchmarks.implementations import IMPLEMENTATIONS, always, never, pinned
from benchmarks.runner import run_case
from ffn.ops.kernels import tilings
from ffn.ops.kernels.tilings import Tiling

TILING = Tiling(16, 16, 16, 8, 1, 4, 2)


@pytest.mark.parametrize("gated", [False, True])
def test_choose_reads_the_table_of_tune(gated: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unable = Tiling(16, 16, 3, 8, 1, 4, 2)
    monkeypatch.setattr(tune, "BLOCKS", {"toy": (16, 32, gated)})
    monkeypatch.setattr(tune, "CANDIDATES", {way: [TILING, unable] for way in tune.CANDIDATES})
    table = tmp_path / "tilings.json"
    table.write_text('{"another device": null}\n')
    words = f"--device cpu --tokens 16 --rounds 1 --table {table} --out {tmp_path}"
    tune.main([*words.split(), "--blocks", "toy"])
    written = json.loads(table.read_text())
    form = "gated" if gated else "plain"
    keys = {f"{way} {form} sm90 bfloat16 D16 H32 N4" for way in ("forward", "backward")}
    assert set(written) == keys | {"another device"}
    rows = [json.loads(line) for line in (tmp_path / "tune.jsonl").read_text().splitlines()]
    assert {row["case"] for row in rows} == keys
    for row in rows:
        assert row["error"] <= tune.WRONG
        assert "16x16x3x8x1x4x2: " in row["left_out"]
        assert (written[row["case"]] is None) == (row["tiling"] == "unfused") == (row["speedup"] < 1.01)
    monkeypatch.setattr(tilings, "TABLE", table)
    tilings._measured.cache_clear()
    found = tilings.choose(True, (9, 0), "bfloat16", gated, 16, 32, 16)
    tilings._measured.cache_clear()
    assert found in (None, TILING)


@pytest.mark.parametrize("choose", [always, never], ids=["fused", "unfused"])
@pytest.mark.parametrize("work", ["training", "inference"])
def test_benchmark_runs_the_kernels(work: str, choose) -> None:
    block = replace(BLOCKS["qwen2.5-0.5b"], dim=64, hidden_dim=128)
    case = Case(block, 32 if work == "training" else 1, "bfloat16", work)
    builders = {name: IMPLEMENTATIONS[name] for name in ("torch", "ffn triton")}
    with pinned(choose):
        rows = run_case(case, builders, torch.device("cpu"), seconds=0.0)
    (ours,) = (row for row in rows if row["implementation"] == "ffn triton")
    assert ours["note"] == "backend triton"
    assert ours["ms"] > 0
