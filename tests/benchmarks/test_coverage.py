"""The count of what `ffn.swap` takes: each outcome found on a model that has it, and the table of them."""

import pytest
import torch
from torch import nn

from benchmarks import coverage

transformers = pytest.importorskip("transformers")


def test_a_llama_is_swapped_whole():
    row = coverage.examine("causal", "llama")
    assert row["outcome"] == "swapped"
    assert row["classes"] == ["LlamaMLP"]
    assert row["apart"] < 1e-9


def test_an_activation_without_a_row_is_left_with_its_reason():
    row = coverage.examine("causal", "apertus")
    assert row["outcome"] == "left"
    assert "no activation of the table" in row["reason"]
    assert any(path.endswith("mlp.up_proj") for path in row["missed"])


def test_what_cannot_be_built_says_why():
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


def test_a_block_not_seen_is_missed(monkeypatch):
    real = coverage.ffn.swap
    monkeypatch.setattr(coverage.ffn, "swap", lambda model: real(nn.Identity()))
    row = coverage.examine("causal", "llama")
    assert row["outcome"] == "left"
    assert len(row["missed"]) == 6


def test_the_table_counts_and_names():
    rows = [
        {"kind": "causal", "model_type": "a", "outcome": "swapped", "reason": ""},
        {"kind": "causal", "model_type": "b", "outcome": "left", "reason": "a | b"},
        {"kind": "causal", "model_type": "c", "outcome": "none", "reason": ""},
    ]
    text = coverage.table(rows, "torch")
    assert "| causal | 3 | 1 | 1 | 0 | 1 | 0 | 50.0% |" in text
    assert "| causal | b | left | a \\| b |" in text
    assert "Swapped, causal: a." in text
