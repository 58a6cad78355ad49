"""The instruments are right in what they count, compare and average; and the benchmarks run, on toy sizes."""

import json
import statistics
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import generation, shakespeare, timing, training_step
from benchmarks.baseline import GPT


def test_candidates_take_turns_and_warm_up_is_not_counted() -> None:
    calls: list[str] = []
    candidates = {name: partial(calls.append, name) for name in ("a", "b")}
    seconds = timing.measure(candidates, rounds=5, warmup=2)
    assert [len(seconds[name]) for name in ("a", "b")] == [5, 5]
    assert all({*calls[i : i + 2]} == {"a", "b"} for i in range(0, 14, 2))


def test_a_speedup_is_the_median_of_the_rounds_ratios_inside_its_interval() -> None:
    base, other = [2.0, 30.0, 2.0, 4.0], [1.0, 10.0, 1.0, 2.0]
    ratio, low, high = timing.speedup(base, other)
    assert ratio == statistics.median([2.0, 3.0, 2.0, 2.0])
    assert low <= ratio <= high
    row = timing.comparison(base, other)
    assert row == {"ms": 1500.0, "iqr": 3000.0, "speedup": ratio, "low": low, "high": high}


def test_saved_bytes_count_each_storage_once_and_no_parameter() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.GELU(), nn.Linear(5, 3))
    x = torch.randn(7, 3)
    assert timing.saved_bytes(lambda: model(x), model) == 4 * 7 * (3 + 5 + 5)


def test_the_baseline_has_the_parameters_of_the_recipe_and_looks_at_no_future() -> None:
    model = GPT(65, 128, 4, 4, 64, bias=False).eval()
    assert sum(p.numel() for p in model.parameters()) == 4 * (12 * 128**2 + 2 * 128) + (65 + 64 + 1) * 128
    tokens = torch.randint(65, (2, 9))
    changed = tokens.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % 65
    torch.testing.assert_close(model(tokens)[:, :5], model(changed)[:, :5])
    loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), changed.flatten())
    torch.testing.assert_close(model(tokens, changed), loss)
    assert model.generate(tokens, 3).shape == (2, 12)


def test_the_validation_loss_reads_every_full_window_once() -> None:
    tokens = torch.randint(7, (3 * 4 + 3,))
    seen: list[torch.Tensor] = []

    def uniform(x: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return torch.zeros(*x.shape, 7)

    loss = shakespeare.validation_loss(uniform, tokens, window=4)
    assert loss == pytest.approx(torch.tensor(7.0).log().item())
    assert torch.equal(torch.cat(seen).flatten(), tokens[:12])


def test_the_recipe_warms_up_decays_and_learns() -> None:
    rates = [shakespeare.learning_rate(step, 2000) for step in range(2001)]
    assert max(rates) == rates[100] == shakespeare.PEAK
    assert rates[2000] == pytest.approx(shakespeare.FLOOR)
    row = shakespeare.run_baseline("abcd" * 400, steps=20, seed=0)
    assert row["val_loss"] < 1.3  # untrained: the logarithm of 4, 1.39


def rows_of(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def test_training_step_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_step, "SHAPES", {"toy": training_step.Shape(11, 16, 2, 2, 8, batch=2)})
    training_step.main(f"--shapes toy --rounds 2 --results {tmp_path}".split())
    rows = rows_of(tmp_path, "training_step")
    assert len(rows) == 4
    assert len({row["parameters"] for row in rows}) == 1, "the two models are of the same size"


def test_generation_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"VOCAB": 64, "DIM": 16, "LAYERS": 2, "HEADS": 2, "WINDOW": 32}.items():
        monkeypatch.setattr(generation, name, value)
    words = f"--dtypes float32 --rounds 2 --prompt-tokens 4 --new-tokens 6 --results {tmp_path}"
    generation.main(words.split())
    rows = {row["implementation"]: row for row in rows_of(tmp_path, "generation")}
    assert rows["ffn"]["parameters"] == rows["torch, no cache"]["parameters"]
    assert rows["ffn"]["tokens_per_s"] > 0
