"""What tuning decides with; the whole of it runs in `tests/ops/kernels/interpreted/test_benchmarks.py`."""

import math
from pathlib import Path

import pytest
import torch

from benchmarks import tune
from benchmarks.tune import Case
from ffn.ops.kernels import tilings
from ffn.ops.kernels.tilings import Tiling


def test_the_blocks_have_the_widths_of_their_names() -> None:
    for name, (D, H, gated) in tune.BLOCKS.items():
        assert name == f"{D}/{H}" + " gated" * gated


@pytest.mark.parametrize("forward", [True, False])
@pytest.mark.parametrize("gated", [True, False])
def test_every_case_has_candidates(forward: bool, gated: bool) -> None:
    found = tune.candidates(Case(forward, 768, 3072, gated, 8192), (9, 0))
    assert {*found.values()} == {None, *tune.CANDIDATES[forward, gated]}


def test_an_output_that_is_missing_or_no_number_is_wrong() -> None:
    exact = torch.tensor([3.0, 4.0])
    assert tune.error_of((exact, None), (exact, None)) == 0.0
    assert tune.error_of((exact * 2, exact), (exact, exact)) == pytest.approx(1.0)
    assert tune.error_of((exact * math.nan,), (exact,)) == math.inf
    assert tune.error_of((None,), (exact,)) == math.inf


def test_what_may_be_luck_is_not_kept() -> None:
    unfused = (1.0, 1.0, 1.0)
    assert tune.best_of({"unfused": unfused, "a": (1.02, 1.01, 1.03), "b": (1.2, 1.1, 1.3)}) == "b"
    assert tune.best_of({"unfused": unfused, "a": (1.2, 0.99, 1.4)}) == "unfused"
    assert tune.best_of({"unfused": unfused, "a": (1.005, 1.004, 1.006)}) == "unfused"
    assert tune.best_of({"unfused": unfused}) == "unfused"


def test_times_of_the_interpreter_do_not_come_into_the_table_that_ships() -> None:
    for words in ([], ["--table", str(tilings.TABLE.parent / "." / tilings.TABLE.name)]):
        with pytest.raises(SystemExit, match=r"^python -m benchmarks tune: times of the interpreter want a "):
            tune.main(["--device", "cpu", *words])


def test_a_table_that_stands_is_kept_and_one_that_is_damaged_begun_anew(tmp_path: Path) -> None:
    table = {"a": None, "b": Tiling(128, 64, 32, 8, 2, 8, 3)}
    path = tmp_path / "tilings.json"
    assert tune.read(path) == {}
    path.write_text(tilings.to_json(table))
    assert tune.read(path) == table
    path.write_text('{"a": {"rows": 1}}')
    assert tune.read(path) == {}


def test_where_no_kernel_runs_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(SystemExit, match="python -m benchmarks tune: backend must be"):
        tune.main(["--device", "cpu", "--table", str(tmp_path / "tilings.json")])
