"""The yardstick has the matmuls of the block; each case gets its clock and its yardstick."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import runner, timing, yardstick
from benchmarks.cases import BLOCKS, WARM, Block, Case
from benchmarks.implementations import IMPLEMENTATIONS, Contender
from benchmarks.plain import set_up

CPU = torch.device("cpu")
PLAIN, GATED = (replace(BLOCKS[name], dim=16, hidden_dim=24) for name in ("gpt2", "qwen2.5-0.5b"))


def rows_of(case: Case, **builders) -> dict[str, dict]:
    builders = {"torch": IMPLEMENTATIONS["torch"]} | builders
    return {row["implementation"]: row for row in runner.run_case(case, builders, CPU, seconds=0.0)}


@pytest.mark.parametrize(("block", "forms"), [(PLAIN, ["apart"]), (GATED, ["apart", "joined"])])
@pytest.mark.parametrize("work", ["training", "inference"])
def test_yardstick_has_the_matmuls_of_the_block(block: Block, forms: list[str], work: str) -> None:
    case = Case(block, tokens=100, work=work)
    runs = yardstick.yardsticks(case, *set_up(case, CPU))
    assert list(runs) == [f"ceiling {form}" for form in forms]
    for run in runs.values():
        with FlopCounterMode(display=False) as counter:
            run()
        assert counter.get_total_flops() == case.flops


@pytest.mark.parametrize(
    ("tokens", "work", "clock"),
    [(64, "inference", "cold"), (64, WARM, "warm"), (65, "inference", ""), (65, WARM, "warm")],
)
def test_each_case_gets_its_clock_and_two_warmup_rounds(monkeypatch, tokens, work, clock) -> None:
    asked, clock_of, measure = [], runner.clock_of, runner.measure

    def seen_clock(device, **kinds):
        asked.append("".join(kind for kind, wanted in kinds.items() if wanted))
        return clock_of(device)

    def seen_measure(runs, **options):
        asked.append(options["warmup"])
        return measure(runs, **options)

    monkeypatch.setattr(runner, "clock_of", seen_clock)
    monkeypatch.setattr(runner, "measure", seen_measure)
    rows_of(Case(PLAIN, tokens, work=work))
    assert asked == [clock, 2]


def test_blocks_exceed_the_cache() -> None:
    for size in (1 << 20, 5 << 20, 2 * timing.CACHE_BYTES):
        weights = {"w": torch.empty(size, dtype=torch.int8)}
        assert yardstick.blocks_of(weights) * size > timing.CACHE_BYTES
    assert yardstick.blocks_of({"w": torch.empty(4)}) == 1
    case = Case(replace(PLAIN, dim=512, hidden_dim=2048), tokens=1, work="inference")
    assert rows_of(case)["torch"]["blocks"] == yardstick.blocks_of(set_up(case, CPU)[0]) > 1
    assert "blocks" not in rows_of(replace(case, tokens=65))["torch"]


def test_int8_has_a_looser_limit_and_no_ceiling() -> None:
    def off(case: Case, weights) -> Contender:
        contender = IMPLEMENTATIONS["torch"](case, weights)
        contender.module.register_forward_hook(lambda module, args, y: 1.05 * y)
        return contender

    rows = rows_of(Case(PLAIN, tokens=100, work="inference"), **{"ffn int8": off, "ffn": off})
    assert rows["ffn int8"]["ms"] > 0 < rows["torch"]["of_ceiling"]
    assert "of_ceiling" not in rows["ffn int8"]
    assert rows["ffn"]["note"] == "wrong, so not timed"


@pytest.mark.parametrize("products", [0.1, 0.0001])
def test_ceiling_of_few_tokens_is_the_longer_of_matmuls_and_reading(products: float) -> None:
    case, weights = Case(GATED, 8, work="inference"), {"up_proj.weight": torch.zeros(1 << 18)}
    taken = {"ceiling joined": [2 * products] * 3, "ceiling apart": [products] * 3}
    taken |= {"ceiling copy": [1.0] * 3}
    seconds, rate = yardstick.yardstick(case, weights, taken)
    reading = 4 * (1 << 18) / (2 * (1 << 27))
    assert seconds == pytest.approx([max(products, reading)] * 3)
    copied, multiplied = {"gbs": (1 << 28) / 1e9}, {"tflops": case.flops / products / 1e12}
    assert rate == pytest.approx(copied if products < reading else copied | multiplied)
    assert taken == {}
    assert yardstick.yardstick(case, weights, {}) is None
