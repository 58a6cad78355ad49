"""Loading allocates the model and at most one more tensor."""

import sys
from pathlib import Path

import pytest

from benchmarks import loading

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
ROOM = 12.0  # MB for Python and the allocator


def test_loading_allocates_the_model_and_at_most_one_more_tensor(tmp_path: Path) -> None:
    facts = loading.write(tmp_path, dim=256, size=64 * 2**20)
    assert 50 < facts["model_MB"] < 70
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    row = loading.measure("ffn", tmp_path)
    assert "note" not in row
    for key in ("anon_MB", "peak_MB", "used_MB"):
        assert 0.9 * facts["model_MB"] < row[key] < facts["model_MB"] + facts["largest_MB"] + ROOM, key
    row = loading.measure("ffn, to bfloat16", tmp_path)
    half = facts["model_MB"] / 2
    assert 0.9 * half < row["anon_MB"] < half + facts["largest_MB"] / 2 + ROOM


def test_failure_becomes_a_note(tmp_path: Path) -> None:
    row = loading.measure("ffn", tmp_path)
    assert "config.json: cannot read this file" in row["note"]
