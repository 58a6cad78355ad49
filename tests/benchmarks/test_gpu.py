"""The benchmark for GPUs, dry on the CPU: contenders are the same block, rows are true, jobs are bounded."""

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import contenders, gpu
from benchmarks.contenders import Contender, always, build_quack, build_torch, never, pinned
from ffn.ops.kernels import tilings

CPU = torch.device("cpu")
CASE = replace(gpu.CASES["qwen-8192"], dim=16, hidden_dim=24, tokens=8)


def rows_of(folder: Path) -> dict[tuple[str, str], dict]:
    rows = [json.loads(line) for line in (folder / "gpu.jsonl").read_text().splitlines()]
    return {(row["case"], row["implementation"]): row for row in rows}


def test_cases_and_jobs_name_what_exists() -> None:
    assert {name for job in gpu.JOBS for name in job.cases} == set(gpu.CASES)
    assert {name for job in gpu.JOBS for name in job.names} == set(contenders.IMPLEMENTATIONS)


def test_a_dry_run(tmp_path: Path) -> None:
    words = f"--device cpu --cases gpt2-dropout-8192 qwen-8192 decode-4 --rounds 2 --results {tmp_path}"
    names = ["torch", "liger", "ffn", "ffn unfused", "ffn fused", "ffn save=input"]
    gpu.main([*words.split(), "--implementations", *names])
    rows = rows_of(tmp_path)
    assert len(rows) == 3 * (len(names) + 1), "one of each, and the ceiling"
    assert "no erf GELU" in rows["gpt2-dropout-8192", "liger"]["note"]
    for (_, name), row in rows.items():
        if name.startswith(("torch", "ffn")):
            assert row["error"] <= gpu.WRONG
            assert row["low"] <= row["speedup"] <= row["high"]
            assert row["of_ceiling"] > 0
    tokens, dim, hidden_dim = 32, 64, 128
    kept = {name: rows["qwen-8192", name]["saved_MB"] for name in ("ffn", "ffn save=input")}
    assert kept["ffn"] == pytest.approx(2e-6 * tokens * (dim + 2 * hidden_dim))
    assert kept["ffn save=input"] == pytest.approx(2e-6 * tokens * dim)


def test_a_wrong_contender_is_not_timed_and_a_failing_one_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def swapped(case, weights) -> Contender:
        gate, up = weights["gate_proj.weight"], weights["up_proj.weight"]
        return build_torch(case, {**weights, "gate_proj.weight": up, "up_proj.weight": gate})

    def broken(case, weights) -> Contender:
        raise OSError("no such library\nand a long story")

    monkeypatch.setattr(gpu, "IMPLEMENTATIONS", {"torch": build_torch, "swapped": swapped, "broken": broken})
    rows = gpu.run_case(CASE, ["torch", "swapped", "broken"], CPU, rounds=2)
    torch_row, swapped_row, broken_row, _ = rows
    assert torch_row["ms"] > 0
    assert swapped_row["note"] == "wrong, so not timed"
    assert "ms" not in swapped_row
    assert broken_row["note"] == "OSError: no such library"


def test_quack_gets_gate_and_up_by_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    class MLP(nn.Module):  # with quack's layout of weights
        def __init__(self, in_features: int, hidden_features: int, *, activation: str, tuned: bool):
            super().__init__()
            self.fc1 = nn.Linear(in_features, 2 * hidden_features, bias=False)
            self.fc2 = nn.Linear(hidden_features, in_features, bias=False)

        def forward(self, x):
            pre = self.fc1(x)
            return self.fc2(F.silu(pre[..., ::2]) * pre[..., 1::2])

    module = ModuleType("quack.mlp")
    module.MLP = MLP
    monkeypatch.setitem(sys.modules, "quack", ModuleType("quack"))
    monkeypatch.setitem(sys.modules, "quack.mlp", module)
    monkeypatch.setattr(gpu, "IMPLEMENTATIONS", {"quack": partial(build_quack, tuned=False)})
    (row, _) = gpu.run_case(CASE, ["quack"], CPU, rounds=1)
    assert row["error"] <= gpu.WRONG
    assert row["note"].endswith("quack-kernels")


def test_what_is_fused_is_pinned_for_a_while() -> None:
    choose = tilings.choose
    case = (True, (9, 0), "bfloat16", True, 4096, 14336, 8192)
    with pinned(always):
        assert tilings.choose(*case) == tilings.DEFAULTS[9][True, True]
        with pinned(never):
            assert tilings.choose(*case) is None
    assert tilings.choose is choose


def test_each_job_has_a_process_and_what_is_not_reached_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    jobs = [gpu.Job(("qwen-8192",), ("torch", "ffn")), gpu.Job(("llama-8192",), ("ffn",), limit=0.01)]
    jobs += [gpu.Job(("2048-8192",), ("quack",), package="no_such_package")]
    monkeypatch.setattr(gpu, "JOBS", jobs)
    gpu.main(f"--device cpu --rounds 1 --results {tmp_path}".split())
    rows = rows_of(tmp_path)
    assert rows["qwen-8192", "ffn"]["ms"] > 0
    assert rows["llama-8192", "ffn"]["note"] == "skipped: not done in the 0 s it was given"
    assert rows["2048-8192", "quack"]["note"] == "skipped: no_such_package is not installed"
    monkeypatch.setattr(gpu, "JOBS", jobs[:2])
    gpu.main(f"--device cpu --budget 1 --results {tmp_path}/late".split())
    late = rows_of(tmp_path / "late").values()
    assert {row["note"] for row in late} == {"skipped: the budget of 1 s is spent"}
    assert capsys.readouterr().out.count("| llama-8192 | ffn |") == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(SystemExit, match="torch sees no GPU; --device cpu makes a dry run"):
        gpu.main([])
