"""Timing and counting: averages, comparisons, saved bytes."""

import itertools
import math
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from benchmarks import timing
from benchmarks.timing import Rotation, clock_of, speedup

SECONDS = st.lists(st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)), min_size=1, max_size=9)


def test_candidates_take_turns_and_warmup_is_not_counted() -> None:
    calls: list[str] = []
    candidates = {name: partial(calls.append, name) for name in ("a", "b")}
    seconds = timing.measure(candidates, rounds=5, warmup=2)
    assert [len(seconds[name]) for name in ("a", "b")] == [5, 5]
    assert all({*calls[i : i + 2]} == {"a", "b"} for i in range(0, 14, 2))


def test_a_speedup_is_the_ratio_of_medians() -> None:
    assert speedup([2.0, 4.0, 100.0], [1.0, 2.0, 1.5])[0] == 4.0 / 1.5
    assert speedup([3.0] * 5, [2.0] * 5) == (1.5, 1.5, 1.5)


@given(SECONDS)
@settings(max_examples=30)
def test_interval_lies_within_the_range_of_the_rounds(rounds: list[tuple[float, float]]) -> None:
    base, other = (list(side) for side in zip(*rounds, strict=True))
    ratio, low, high = speedup(base, other, draws=50)
    assert ratio == median(base) / median(other)
    assert min(base) / max(other) <= low <= high <= max(base) / min(other)


def test_comparison_gives_median_spread_and_speedup() -> None:
    base, other = [2.0, 30.0, 2.0, 4.0], [1.0, 10.0, 1.0, 2.0]
    ratio, low, high = timing.speedup(base, other)
    row = timing.comparison(base, other)
    assert row == {"ms": 1500.0, "iqr": 3000.0, "speedup": ratio, "low": low, "high": high}


def test_comparison_without_a_baseline_has_times_only() -> None:
    assert timing.comparison(None, [1.0, 10.0, 1.0, 2.0]) == {"ms": 1500.0, "iqr": 3000.0}


def test_nan_is_the_worst_error() -> None:
    assert timing.worst([1.0, 3.0, 2.0]) == 3.0
    for errors in itertools.permutations([1.0, math.nan, math.inf]):
        assert math.isnan(timing.worst(errors))


def test_fill_size_is_twice_the_cache(tmp_path: Path) -> None:
    assert timing.twice_the_cache(tmp_path) == 64 << 20
    for level, size in enumerate(("32K", "32K", "2048K", "107520K")):
        (tmp_path / f"index{level}").mkdir()
        (tmp_path / f"index{level}" / "size").write_text(f"{size}\n")
    assert timing.twice_the_cache(tmp_path) == 2 * 107520 << 10
    (tmp_path / "index3" / "size").unlink()
    assert timing.twice_the_cache(tmp_path) == 64 << 20


def test_cold_clock_fills_the_cache_before_each_call(monkeypatch) -> None:
    done = []
    buffer = SimpleNamespace(sum=lambda: done.append("fill"))
    monkeypatch.setattr(timing.torch, "zeros", lambda count, **how: done.append(4 * count) or buffer)
    clock = clock_of(torch.device("cpu"), cold=True)
    for _ in range(2):
        clock(partial(done.append, "run"))
    assert done == [timing.CACHE_BYTES, "fill", "run", "fill", "run"]


def test_warm_clock_is_the_mean_of_calls_after_as_many_warm_ups(monkeypatch) -> None:
    called, now = [], [0.0]

    def run() -> None:
        called.append(1)
        now[0] += 100.0 if len(called) <= 10 else len(called) - 10.0

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    assert clock_of(torch.device("cpu"), warm=True)(run) == 5.5
    assert len(called) == 20


def test_saved_bytes_count_each_storage_once_and_no_parameter() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.GELU(), nn.Linear(5, 3))
    x = torch.randn(7, 3)
    assert timing.saved_bytes(lambda: model(x), model.parameters()) == 4 * 7 * (3 + 5 + 5)


def test_saved_bytes_count_attributes_of_functions() -> None:
    class Holding(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            ctx.one, ctx.many = x.exp(), {"pair": (x.sin(), [x.cos(), x])}
            return x.clone()

    x = torch.randn(7, 3, requires_grad=True)
    assert timing.saved_bytes(lambda: Holding.apply(x).sum(), [x]) == 4 * 7 * 3 * 3
    assert timing.saved_bytes(x.detach, [x]) == 0


def test_rotation_is_timed_per_block_after_an_uncounted_call(monkeypatch) -> None:
    called, now, takes = [], [0.0], [50.0, 1.0, 2.0, 3.0, 7.0]  # the first call warms the code

    def block(i: int) -> None:
        called.append(i)
        now[0] += takes[i]

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    clock, run = clock_of(torch.device("cpu"), cold=True), Rotation([partial(block, i) for i in range(4)])
    assert clock(run) == clock(run) == 2.0
    assert called == [0, 1, 2, 3] * 2
    assert clock(Rotation([partial(block, 4)])) == 7.0
    assert called[8:] == [4, 4]
    assert clock(partial(block, 4)) == 7.0
    assert called[10:] == [4]
