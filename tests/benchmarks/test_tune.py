"""The decisions of tune; a whole run is in `tests/ops/kernels/interpreted/test_benchmarks.py`."""

import math
from pathlib import Path

import pytest
import torch

from benchmarks import tune
from benchmarks.tune import Case
from ffn.ops.kernels import tilings
from ffn.ops.kernels.tilings import Tiling


def test_blocks_have_the_widths_of_their_names() -> None:
    for name, (D, H, gated) in tune.BLOCKS.items():
        assert name == f"{D}/{H}" + " gated" * gated


@pytest.mark.parametrize("forward", [True, False])
@pytest.mark.parametrize("gated", [True, False])
def test_every_case_has_candidates(forward: bool, gated: bool) -> None:
    found = tune.candidates(Case(forward, 768, 3072, gated, 8192), (9, 0))
    assert {*found.values()} == {None, *tune.CANDIDATES[forward, gated]}


def test_missing_and_nan_outputs_are_wrong() -> None:
    exact = torch.tensor([3.0, 4.0])
    assert tune.error_of((exact, None), (exact, None)) == 0.0
    assert tune.error_of((exact * 2, exact), (exact, exact)) == pytest.approx(1.0)
    assert tune.error_of((exact * math.nan,), (exact,)) == math.inf
    assert tune.error_of((None,), (exact,)) == math.inf


def test_gains_within_noise_are_not_kept() -> None:
    unfused = (1.0, 1.0, 1.0)
    assert tune.best_of({"unfused": unfused, "a": (1.02, 1.01, 1.03), "b": (1.2, 1.1, 1.3)}) == "b"
    assert tune.best_of({"unfused": unfused, "a": (1.2, 0.99, 1.4)}) == "unfused"
    assert tune.best_of({"unfused": unfused, "a": (1.005, 1.004, 1.006)}) == "unfused"
    assert tune.best_of({"unfused": unfused}) == "unfused"


def test_interpreter_times_need_their_own_table() -> None:
    for words in ([], ["--table", str(tilings.TABLE.parent / "." / tilings.TABLE.name)]):
        with pytest.raises(SystemExit, match="--table"):
            tune.main(["--device", "cpu", *words])


def test_valid_table_is_read_and_damaged_one_is_empty(tmp_path: Path) -> None:
    table = {"a": None, "b": Tiling(128, 64, 32, 8, 2, 8, 3)}
    path = tmp_path / "tilings.json"
    assert tune.read(path) == {}
    path.write_text(tilings.to_json(table))
    assert tune.read(path) == table
    path.write_text('{"a": {"rows": 1}}')
    assert tune.read(path) == {}


def test_tune_without_a_kernel_device_exits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(SystemExit, match="python -m benchmarks tune: backend must be"):
        tune.main(["--device", "cpu", "--table", str(tmp_path / "tilings.json")])
