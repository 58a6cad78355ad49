"""Whole models: the rows say truly how each code fares."""

import json
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

import ffn
from benchmarks import decoder, models, twins
from benchmarks.models import Case, products, run_case
from benchmarks.twins import GENERATION, SHAPES, TRAINING, Shape, Twin, Weights
from ffn.gpt.cost import flops_per_token, parameter_table

CPU = torch.device("cpu")
TRAINED = Case("training step", "tiny", 2, "float32", dropout=0.1)
GENERATED = Case("generation", "gpt2", 2, "float32", new_tokens=5)


@pytest.fixture(autouse=True)
def _toys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "tiny", Shape(11, 16, 2, 2, 8, 2, "gelu"))
    monkeypatch.setitem(SHAPES, "small", Shape(13, 16, 1, 2, 8, 2, "gelu"))
    monkeypatch.setitem(SHAPES, "gpt2", Shape(40, 16, 2, 2, 24, 2, "gelu_tanh"))


def rows_of(case: Case, **builders) -> dict[str, dict]:
    builders = {"torch": TRAINING["torch"], **builders}
    return {row["implementation"]: row for row in run_case(case, builders, CPU, rounds=3, seconds=60)}


def run(words: str, folder: Path) -> list[dict]:
    decoder.main([*words.split(), "--device", "cpu", "--rounds", "2", "--out", str(folder)])
    return [json.loads(line) for line in (folder / "decoder.jsonl").read_text().splitlines()]


def test_int8_is_one_call_and_a_row_where_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    called = Mock()
    monkeypatch.setattr(ffn, "pack", called)
    build, shape = GENERATION["ffn int8"], GENERATED.shape
    model = build(shape, 0.0, twins.draw(shape, CPU), torch.float64).model
    called.assert_called_once_with(model, form="int8")
    called.side_effect = ValueError("no such form")
    int8 = rows_of(GENERATED, **{"ffn int8": GENERATION["ffn int8"]})["ffn int8"]
    assert int8["note"] == "no such form"
    assert "ms" not in int8


def test_rows_of_training(tmp_path: Path) -> None:
    rows = run("--only tiny,torch,ffn --dtype float32,autocast", tmp_path)
    rows = [row for row in rows if row["work"] == "training step"]
    assert [(row["dtype"], row["dropout"], row["implementation"]) for row in rows] == [
        (dtype, p, name) for dtype in ("float32", "autocast") for p in (0.0, 0.1) for name in ("torch", "ffn")
    ]
    for row in rows:
        assert row["error"] < (1e-6 if row["dtype"] == "float32" else 2e-2)
        assert row["tokens_per_s"] == pytest.approx(2 * 8 / row["ms"] * 1e3)
        assert row["low"] <= row["speedup"] <= row["high"]
        assert 0 < row["mfu"] == pytest.approx(row["tflops"] / row["ceiling_tflops"])
        assert row["saved_MB"] > 0 < row["setup_s"]
    assert len({row["parameters"] for row in rows}) == 1
    assert rows[1]["saved_ratio"] < rows[0]["saved_ratio"] == rows[0]["speedup"] == 1


def test_rows_of_generation(tmp_path: Path) -> None:
    rows = run("--only generation --dtype float32 --new-tokens 6", tmp_path)
    assert [(row["batch"], row["implementation"]) for row in rows] == [
        (batch, name) for batch in (1, 8) for name in GENERATION
    ]
    assert all({"torch", "cpu", "commit"} <= row.keys() and row["device"] == "cpu" for row in rows)
    timed = [row for row in rows if "ms" in row]
    assert {"torch", "ffn"} <= {row["implementation"] for row in timed} <= {*GENERATION}
    for row in timed:
        assert row["error"] < 1e-6
        assert row["new_tokens"] == 6
        assert row["tokens_per_s"] == pytest.approx(6 * row["batch"] / row["ms"] * 1e3)
        assert row["ttft_ms"] > 0
        assert row["low"] <= row["speedup"] <= row["high"]
    assert len({row["parameters"] for row in timed}) == 1


def test_transformers_is_timed_where_it_is(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    rows = run("--only small,transformers --dtype float32", tmp_path)
    assert {row["work"] for row in rows} == {"training step", "generation"}
    theirs = [row for row in rows if row["implementation"] == "transformers"]
    assert all(row["note"].startswith("transformers ") and row["over_transformers"] == 1.0 for row in theirs)


def altered(shape: Shape, dropout: float, weights: Weights, dtype: torch.dtype, **parts) -> Twin:
    return TRAINING["torch"](shape, dropout, weights, dtype)._replace(**parts)


def scaled(shape: Shape, dropout: float, weights: Weights, dtype: torch.dtype) -> Twin:
    weights = weights | {"positions.weight": 1.01 * weights["positions.weight"]}
    return TRAINING["torch"](shape, dropout, weights, dtype)


@pytest.mark.parametrize("case", [TRAINED, GENERATED], ids=["training", "generation"])
def test_a_wrong_one_says_so_and_is_not_timed(case: Case) -> None:
    rows = rows_of(case, wrong=scaled)
    assert rows["wrong"]["note"] == "wrong, so not timed"
    assert rows["wrong"]["error"] > 1e-4
    assert "ms" not in rows["wrong"]
    assert rows["torch"]["ms"] > 0


def test_a_wrong_loss_is_seen_in_the_gradient() -> None:
    def shifted(shape: Shape, dropout: float, weights: Weights, dtype: torch.dtype) -> Twin:
        plain = TRAINING["torch"](shape, dropout, weights, dtype)
        return plain._replace(loss=lambda tokens, targets: plain.loss(tokens, tokens))

    assert rows_of(TRAINED, wrong=shifted)["wrong"]["note"] == "wrong, so not timed"


def test_inner_gradients_left_out_are_seen() -> None:
    def frozen(shape: Shape, dropout: float, weights: Weights, dtype: torch.dtype) -> Twin:
        plain = TRAINING["torch"](shape, dropout, weights, dtype)
        plain.model.blocks[0].mlp.c_fc.weight.requires_grad_(False)
        return plain

    assert rows_of(TRAINED, wrong=frozen)["wrong"]["note"] == "wrong, so not timed"


def test_one_that_drops_nothing_says_so() -> None:
    def lazy(shape: Shape, dropout: float, weights: Weights, dtype: torch.dtype) -> Twin:
        return TRAINING["torch"](shape, 0.0, weights, dtype)

    assert rows_of(TRAINED, lazy=lazy)["lazy"]["note"] == "drops nothing"


def test_wrong_or_missing_tokens_are_seen() -> None:
    def zeros(prompt: Tensor, count: int) -> Tensor:
        return torch.zeros(prompt.shape[0], count, dtype=torch.int64)

    rows = rows_of(
        GENERATED,
        other=partial(altered, generate=zeros),
        fewer=partial(altered, generate=lambda prompt, count: zeros(prompt, count - 1)),
    )
    assert rows["other"]["note"] == "wrong, so not timed: did not choose the likeliest tokens"
    assert rows["fewer"]["note"] == "wrong, so not timed: made (2, 4) tokens"
    assert not {"ms", "tokens_per_s"} & (rows["other"].keys() | rows["fewer"].keys())


def test_eight_bits_do_not_excuse_unlikely_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "regret", lambda *args: 0.4)
    int8 = rows_of(GENERATED, **{"ffn int8": TRAINING["torch"]})["ffn int8"]
    assert int8["note"] == "wrong, so not timed: did not choose the likeliest tokens"


@pytest.mark.parametrize("case", [TRAINED, GENERATED], ids=["training", "generation"])
def test_where_none_is_right_there_are_rows(case: Case) -> None:
    (row,) = rows_of(case, torch=scaled).values()
    assert row["note"] == "wrong, so not timed"


def broken() -> None:
    raise RuntimeError("no more")


def test_nothing_is_compared_with_what_fails_while_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    timing = []

    def failing(shape: Shape, dropout: float, weights: Weights, dtype: torch.dtype) -> Twin:
        plain = TRAINING["torch"](shape, dropout, weights, dtype)
        return plain._replace(loss=lambda *tokens: broken() if timing else plain.loss(*tokens))

    def measure(*args, **options) -> dict[str, list[float]]:
        timing.append(True)
        return timed(*args, **options)

    timed = models.measure
    monkeypatch.setattr(models, "measure", measure)
    rows = rows_of(TRAINED, torch=failing, transformers=failing, ffn=TRAINING["ffn"])
    for name in ("torch", "transformers"):
        assert rows[name]["note"] == "failed: RuntimeError: no more"
        assert "ms" not in rows[name]
    assert rows["ffn"]["ms"] > 0 < rows["ffn"]["mfu"]
    assert not {"speedup", "low", "over_transformers"} & rows["ffn"].keys()


@pytest.mark.parametrize("found", [lambda *args: (broken, 1), lambda *args: broken()], ids=["run", "set up"])
def test_without_a_ceiling_nothing_is_said_of_it(monkeypatch: pytest.MonkeyPatch, found) -> None:
    monkeypatch.setattr(models, "products", found)
    row = rows_of(TRAINED)["torch"]
    assert row["ms"] > 0
    assert not {"mfu", "tflops", "ceiling_tflops"} & row.keys()


def test_what_fails_is_a_row() -> None:
    def raising(error: Exception):
        def build(*args) -> Twin:
            raise error

        return build

    rows = rows_of(
        TRAINED,
        absent=raising(ModuleNotFoundError("No module named 'absent'")),
        large=raising(torch.OutOfMemoryError("CUDA out of memory")),
    )
    assert rows["absent"]["note"] == "ModuleNotFoundError: No module named 'absent'"
    assert rows["large"]["note"] == "out of memory"
    assert rows["torch"]["ms"] > 0


def test_a_case_too_large_for_the_machine_is_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(*args) -> None:
        raise MemoryError

    monkeypatch.setattr(models, "draw", too_large)
    rows = rows_of(GENERATED, ffn=GENERATION["ffn"])
    assert [row["note"] for row in rows.values()] == ["out of memory"] * 2


def test_stopping_keeps_the_finished_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[Case] = []

    def interrupted(case: Case, *args) -> list[dict]:
        if done:
            raise KeyboardInterrupt
        done.append(case)
        return [case.columns("torch")]

    monkeypatch.setattr(decoder, "run_case", interrupted)
    with pytest.raises(SystemExit, match="stopped"):
        run("", tmp_path)
    (row,) = (tmp_path / "decoder.jsonl").read_text().splitlines()
    assert json.loads(row)["implementation"] == "torch"
    assert (tmp_path / "report.html").exists()


def test_a_spent_budget_is_rows(tmp_path: Path) -> None:
    rows = run("--budget 0", tmp_path)
    assert {row["note"] for row in rows} == {"skipped: the budget is spent"}
    cases = {(row["work"], row["shape"], row["batch"], row["dtype"], row["dropout"]) for row in rows}
    assert len(cases) == 2 * 2 * 2 + 2 * 2
    assert {row["shape"] for row in rows if row["work"] == "training step"} == {"tiny", "small"}


@pytest.mark.parametrize(("asked", "training", "generation"), [(2, 2, 2), (20, 20, 5), (40, 40, 10)])
def test_an_interval_is_of_five_rounds_unless_fewer_are_asked_for(
    asked: int, training: int, generation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[int] = []
    monkeypatch.setattr(decoder, "run_case", lambda *words: given.append(words[3]) or [])
    decoder.run([(TRAINED, {}), (GENERATED, {})], CPU, rounds=asked)
    assert given == [training, generation]
    (row,) = run_case(TRAINED, {"torch": TRAINING["torch"]}, CPU, rounds=asked, seconds=0)
    assert row["rounds"] == min(asked, 5)


def test_names_choose_cases_and_implementations() -> None:
    def chosen(only: str, device: torch.device = CPU) -> set[tuple]:
        plan = decoder.plan(device, [], only.split(",") if only else [], 128)
        return {(case.work, case.name, *builders) for case, builders in plan}

    assert ("training step", "gpt2", *TRAINING) in chosen("", torch.device("cuda"))
    assert chosen("generation") == {("generation", "gpt2", *GENERATION)}
    assert chosen("tiny,training step,ffn") == {("training step", "tiny", "torch", "ffn")}
    assert chosen("gpt2,ffn int8,generation") == {("generation", "gpt2", "torch", "ffn int8")}
    assert chosen("ffn int8") == {("generation", "gpt2", "torch", "ffn int8")}
    with pytest.raises(SystemExit, match="none of these implementations does this work"):
        decoder.main(["--only", "training step,ffn int8"])


def test_times_are_of_medians_and_the_rate_that_of_the_ceiling(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"torch": [4.0, 2.0, 9.0], "first token of torch": [0.5, 0.25, 2.0], "ceiling": [1.0, 2.0, 0.5]}
    monkeypatch.setattr(models, "measure", lambda runs, **options: {name: known[name] for name in runs})
    made, trained = (rows_of(case)["torch"] for case in (GENERATED, TRAINED))
    assert (made["ms"], made["ttft_ms"]) == (4000.0, 500.0)
    assert made["tokens_per_s"] == 2 * 5 / 4
    assert not {"mfu", "tflops"} & made.keys()
    per_token = flops_per_token(twins.config_of(TRAINED.shape, 0.1), 8, training=True)
    assert trained["tflops"] == pytest.approx(per_token * 2 * 8 / 4 / 1e12)
    assert trained["ceiling_tflops"] == pytest.approx(products(TRAINED, CPU)[1] / 1e12)
    assert trained["mfu"] == pytest.approx(trained["tflops"] / trained["ceiling_tflops"])
    assert "ttft_ms" not in trained


def test_the_ceiling_has_the_models_products() -> None:
    parts = parameter_table(twins.config_of(TRAINED.shape, 0.0))
    linears = sum(part.flops for part in parts if part.name != "attention")
    assert products(TRAINED, CPU)[1] == 3 * linears * TRAINED.tokens
