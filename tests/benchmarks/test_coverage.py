"""coverage: each outcome occurs for a model that has it, and the table counts them."""

import json

import pytest
import torch
from torch import nn

from benchmarks import coverage

transformers = pytest.importorskip("transformers")


def test_llama_is_swapped():
    row = coverage.examine("causal", "llama")
    assert row["outcome"] == "swapped"
    assert row["classes"] == ["LlamaMLP"]
    assert row["apart"] < 1e-9


def test_an_unknown_activation_is_left_with_its_reason():
    row = coverage.examine("causal", "apertus")
    assert row["outcome"] == "left"
    assert "no activation of the table" in row["reason"]
    assert any(path.endswith("mlp.up_proj") for path in row["missed"])


def test_an_unbuilt_model_has_a_reason():
    row = coverage.examine("causal", "musicgen")
    assert row["outcome"] == "unbuilt"
    assert row["reason"].startswith("not built: AttributeError")


def test_a_swap_that_changes_numbers_is_wrong(monkeypatch):
    def spoil(model: nn.Module):
        with torch.no_grad():
            next(model.parameters()).mul_(1.001)
        return real(model)

    real = coverage.ffn.swap
    monkeypatch.setattr(coverage.ffn, "swap", spoil)
    assert coverage.examine("causal", "llama")["outcome"] == "wrong"


def test_a_block_that_is_not_swapped_is_missed(monkeypatch):
    real = coverage.ffn.swap
    monkeypatch.setattr(coverage.ffn, "swap", lambda model: real(nn.Identity()))
    row = coverage.examine("causal", "llama")
    assert row["outcome"] == "left"
    assert len(row["missed"]) == 6


def test_the_table_counts_outcomes_and_names_types():
    rows = [
        {"kind": "causal", "model_type": "a", "outcome": "swapped", "reason": ""},
        {"kind": "causal", "model_type": "b", "outcome": "left", "reason": "a | b"},
        {"kind": "causal", "model_type": "c", "outcome": "none", "reason": ""},
    ]
    text = coverage.table(rows, "torch")
    assert "| causal | 3 | 1 | 1 | 0 | 1 | 0 | 50.0% |" in text
    assert "| causal | b | left | a \\| b |" in text
    assert "Swapped, causal: a." in text


def test_only_the_rows_of_the_measured_kinds_are_replaced(tmp_path, monkeypatch):
    def examine(kind: str, model_type: str) -> dict:
        return {"kind": kind, "model_type": model_type, "outcome": "none", "reason": ""}

    monkeypatch.setattr(coverage, "examine", examine)
    file = tmp_path / "coverage.jsonl"
    old = [{**examine("causal", "gone"), "outcome": "left"}, examine("vision", "vit")]
    file.write_text("".join(json.dumps(row) + "\n" for row in old))
    coverage.main(["--kind", "causal", "--only", "llama", "--out", str(tmp_path)])
    assert coverage.read(file) == old
    coverage.main(["--kind", "causal", "--out", str(tmp_path)])
    vit, *causal = coverage.read(file)
    assert vit == old[1]
    assert {"llama", "gpt2"} < {row["model_type"] for row in causal}
    assert {row["kind"] for row in causal} == {"causal"}
    assert "| vision | vit | none |" in (tmp_path / "coverage.md").read_text()
