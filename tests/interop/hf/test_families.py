"""Every architecture through its folder, from transformers to ffn and back, with equal outputs."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ffn import load, save
from ffn.interop.hf.folder import save_folder
from tests.interop.hf.tiny import CASES, VOCAB, build_theirs, cases, output_of, transformers

# Tensors of theirs that our models do not have. They change no logits.
UNUSED = {"pooler.dense.weight", "pooler.dense.bias", "cls.predictions.bias", "lm_head.bias"}
EXACT = {"rtol": 0.0, "atol": 1e-10}


def load_theirs(folder: Path, name: str) -> Any:
    """Load with the Auto class; every weight is found and none is left over."""
    cls = CASES[name][0]
    suffix = (
        ""
        if cls.endswith("Model") and "LMHead" not in cls
        else "ForMaskedLM"
        if "Masked" in cls
        else "ForCausalLM"
    )
    auto = getattr(transformers, "AutoModel" + suffix)
    model, report = auto.from_pretrained(folder, output_loading_info=True)
    assert report["missing_keys"] <= UNUSED
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    for module in model.modules():  # a buffer in float32, whatever the dtype, unless loaded in float64
        if isinstance(scale := getattr(module, "embed_scale", None), Tensor):
            scale.copy_(scale.float())
    return model.eval()


@cases
def test_folders_round_trip_with_equal_outputs(name: str, tmp_path: Path) -> None:
    theirs = build_theirs(name)
    size = "4KB" if len(name) % 2 else "1GB"
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=size)
    ours = load(tmp_path / "theirs")
    tokens = torch.randint(3, VOCAB, (2, 9))
    wanted = output_of(theirs, tokens)
    torch.testing.assert_close(numbers(ours, tokens), wanted, **EXACT)
    save(tmp_path / "ours", ours, format="hf")
    torch.testing.assert_close(output_of(load_theirs(tmp_path / "ours", name), tokens), wanted, **EXACT)
    assert torch.equal(numbers(load(tmp_path / "ours"), tokens), numbers(ours, tokens))
    assert ours.origin is not None
    written = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert written["model_type"] == ours.origin["model_type"] == theirs.config.model_type
    assert written["dtype"] == "float64"


@cases
def test_a_model_without_origin_finds_its_architecture(name: str, tmp_path: Path) -> None:
    build_theirs(name).save_pretrained(tmp_path / "theirs")
    ours = load(tmp_path / "theirs")
    ours.origin = None
    save_folder(tmp_path / "ours", ours, max_shard_bytes=5000)
    tokens = torch.randint(3, VOCAB, (2, 9))
    theirs = load_theirs(tmp_path / "ours", name)
    torch.testing.assert_close(output_of(theirs, tokens), numbers(ours, tokens), **EXACT)


@torch.no_grad()
def numbers(model: Any, tokens: Tensor) -> Tensor:
    return model.hidden(tokens) if model.config.head == "none" else model(tokens)
