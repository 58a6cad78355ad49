"""The runner's rows for implementations that sleep, are wrong, allocate, fail, or are equal."""

import random
import time
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from benchmarks import runner, timing
from benchmarks.cases import BLOCKS, WARM, Case
from benchmarks.implementations import IMPLEMENTATIONS, Contender
from benchmarks.runner import run_case

CPU = torch.device("cpu")
BLOCK = replace(BLOCKS["qwen2.5-0.5b"], dim=16, hidden_dim=24)
CASE = Case(BLOCK, tokens=8)
N, D, H = CASE.tokens, BLOCK.dim, BLOCK.hidden_dim


def rows_of(case: Case, **builders) -> dict[str, dict]:
    builders = {"torch": IMPLEMENTATIONS["torch"], **builders}
    return {row["implementation"]: row for row in run_case(case, builders, CPU, seconds=0.0)}


def after(case: Case, weights, then) -> Contender:
    """Build the plain block with `then` applied to its output."""
    contender = IMPLEMENTATIONS["torch"](case, weights)
    contender.module.register_forward_hook(lambda module, args, y: then(y))
    return contender


def slept(seconds: float, y):
    time.sleep(seconds)
    return y


@pytest.mark.parametrize("work", ["training", "inference"])
def test_sleeping_implementation_is_slower_by_its_sleep(work: str) -> None:
    builders = {name: partial(after, then=partial(slept, s)) for name, s in (("torch", 0.01), ("slow", 0.1))}
    rows = rows_of(replace(CASE, work=work), **builders)
    assert rows["torch"]["ms"] >= 10
    assert rows["slow"]["ms"] >= 100
    assert rows["slow"]["speedup"] == pytest.approx(rows["torch"]["ms"] / rows["slow"]["ms"])
    assert rows["slow"]["low"] <= rows["slow"]["speedup"] <= rows["slow"]["high"]
    assert rows["torch"]["speedup"] == 1.0
    assert rows["slow"]["rounds"] == 5
    ceiling = rows["torch"]["of_ceiling"]
    assert ceiling > 0
    assert rows["slow"]["of_ceiling"] == pytest.approx(ceiling * rows["slow"]["speedup"])
    assert rows["slow"]["tflops"] == pytest.approx(rows["torch"]["tflops"] * rows["slow"]["speedup"])


@pytest.mark.parametrize("work", ["training", "inference"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "autocast"])
def test_wrong_implementation_gets_a_note_and_no_time(work: str, dtype: str) -> None:
    rows = rows_of(replace(CASE, work=work, dtype=dtype), wrong=partial(after, then=lambda y: 1.03 * y))
    assert rows["wrong"]["note"] == "wrong, so not timed"
    assert rows["wrong"]["error"] == pytest.approx(0.03, rel=0.2)
    assert "ms" not in rows["wrong"]
    assert rows["torch"]["ms"] > 0


def test_wrong_gradient_gets_a_note() -> None:
    def stopped(y):
        return y.detach() + 0 * y

    assert rows_of(CASE, wrong=partial(after, then=stopped))["wrong"]["note"] == "wrong, so not timed"


def test_missing_dropout_gets_a_note() -> None:
    rows = rows_of(replace(CASE, dropout=0.3), lazy=lambda case, w: IMPLEMENTATIONS["torch"](CASE, w))
    assert rows["lazy"]["note"] == "wrong, so not timed: drops too little or too much"
    assert rows["torch"]["ms"] > 0


def test_another_mask_in_backward_gets_a_note() -> None:
    def build(case: Case, weights) -> Contender:
        contender = IMPLEMENTATIONS["torch"](case, weights)
        module = contender.module

        def forward(x):
            h = module.act(module.gate_proj(x)) * module.up_proj(x)
            if not module.training:
                return module.down_proj(h)
            y, dropped = module.down_proj(h), module.down_proj(nn.functional.dropout(h, 0.3))
            return y + (dropped - y).detach()  # backward sees y

        module.forward = forward
        return contender

    rows = rows_of(replace(CASE, dropout=0.3, tokens=64), other=build)
    assert rows["other"]["note"] == "wrong, so not timed: backward drops others than forward"


def test_case_without_baseline_has_times_and_no_speedups() -> None:
    calls = iter(range(100))

    def tired(y):
        if next(calls) > 4:
            raise OSError
        return y

    rows = rows_of(CASE, torch=partial(after, then=tired), ffn=IMPLEMENTATIONS["ffn"])
    assert rows["torch"]["note"].startswith("failed: ")
    assert "ms" not in rows["torch"]
    assert rows["ffn"]["ms"] > 0
    assert "speedup" not in rows["ffn"]


def test_allocated_and_saved_bytes_are_counted() -> None:
    def hoard(y):
        _ = torch.empty(1 << 20)
        return y

    def save(y):
        return y * torch.ones_like(y).requires_grad_()  # saves both factors

    rows = rows_of(CASE, hoard=partial(after, then=hoard), save=partial(after, then=save))
    plain, y_bytes = rows["torch"], 4 * N * D
    assert rows["hoard"]["peak_MB"] >= 4 * (1 << 20) / 1e6
    assert rows["hoard"]["saved_per_token"] == plain["saved_per_token"]
    assert rows["save"]["saved_per_token"] - plain["saved_per_token"] == 2 * y_bytes / N


def test_peak_is_the_most_memory_alive_at_once() -> None:
    def run() -> None:
        a = torch.zeros(1000)
        b = a + 1
        del a
        c = b.view(10, 100)[1:] + 1  # a view keeps b alive and has no memory of its own
        del b
        _ = c + 1

    assert timing.peak_bytes(run, CPU) == 8000
    assert timing.peak_bytes(lambda: None, CPU) == 0


def test_raising_implementation_does_not_affect_the_others() -> None:
    calls = iter(range(100))

    def tired(y):
        if next(calls) > 4:
            raise OSError("worn out\nand a long story")
        return y

    def no_memory(case, weights):
        raise torch.OutOfMemoryError("tried to allocate much")

    def refused(case, weights):
        raise ValueError("has no such block")

    builders = {"tired": partial(after, then=tired), "no memory": no_memory, "refused": refused}
    rows = rows_of(CASE, **builders)
    notes = {name: rows[name]["note"] for name in builders}
    assert notes == {
        "tired": "failed: OSError: worn out",
        "no memory": "out of memory",
        "refused": "has no such block",
    }
    assert all("ms" not in rows[name] for name in builders)
    assert rows["torch"]["ms"] > 0
    assert rows["ceiling"]["ms"] > 0


def test_failing_device_loses_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_, **__):
        raise RuntimeError("an illegal memory access")

    def culprit(case, weights):
        monkeypatch.setattr(runner, "clock_of", broken)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "empty_cache", broken)
        raise RuntimeError("an illegal instruction")

    rows = rows_of(CASE, culprit=culprit, ffn=IMPLEMENTATIONS["ffn"])
    assert {name: row["note"] for name, row in rows.items()} == {
        "torch": "failed: RuntimeError: an illegal memory access",
        "culprit": "RuntimeError: an illegal instruction",
        "ffn": "failed: RuntimeError: an illegal memory access",
        "ceiling": "failed: RuntimeError: an illegal memory access",
    }
    assert all("ms" not in row for row in rows.values())


def test_too_large_case_gets_rows_with_notes() -> None:
    huge = replace(CASE, tokens=1 << 50)
    rows = rows_of(huge, ffn=IMPLEMENTATIONS["ffn"])
    assert set(rows) == {"torch", "ffn", "ceiling"}
    assert {row["note"] for row in rows.values()} == {"out of memory"}


FIVE = {"small": 256, "minilm": 384, "bert-base": 768, "gpt2": 768, "qwen2.5-0.5b": 896}


@pytest.mark.parametrize("name", FIVE)
def test_saved_bytes_equal_the_hand_count(name: str) -> None:
    block = BLOCKS[name]
    dim, hidden = block.dim, block.hidden_dim
    assert dim == FIVE[name]
    builders = {name: IMPLEMENTATIONS[name] for name in ("ffn", "ffn save=input")}
    rows = rows_of(Case(block, tokens=3), **builders)
    saved = {name: row.get("saved_per_token") for name, row in rows.items()}
    # plain torch saves x, the input and output of the activation; gated, also the factor and the product
    assert saved["torch"] == 4 * (dim + (4 if block.gated else 2) * hidden)
    assert saved["ffn"] == 4 * (dim + (2 if block.gated else 1) * hidden)
    assert saved["ffn save=input"] == 4 * dim


def noisy(draw: random.Random, slow: float) -> float:
    """Draw a time on a shared machine: a few percent of spread, and sometimes an interruption."""
    burst = draw.uniform(1.2, 3) if draw.random() < 0.15 else 1.0
    return slow * burst * draw.lognormvariate(0, 0.05)


@pytest.mark.parametrize("rounds", [5, 10, 20])
def test_interval_contains_the_truth_nine_times_in_ten(rounds: int) -> None:
    draw, held = random.Random(0), 0
    for _ in range(200):
        hours = [draw.choice([1, 1, 1, 1.3]) for _ in range(rounds)]
        base, other = ([noisy(draw, hour) for hour in hours] for _ in range(2))
        _, low, high = timing.speedup(base, other, draws=300)
        held += low <= 1 <= high
    assert held >= 180


def test_warm_inference_runs_on_cpus_only() -> None:
    builders = {"torch": IMPLEMENTATIONS["torch"]}
    rows = run_case(replace(CASE, work=WARM), builders, torch.device("cuda"))
    assert [(row["implementation"], row["note"]) for row in rows] == [
        ("torch", "runs on CPUs"), ("ceiling", "runs on CPUs"),
    ]  # fmt: skip
