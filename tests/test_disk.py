"""Models on disk: a saved model loads as it was; a damaged or foreign one is refused."""

import os
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import save_file

from ffn.disk import load, load_tokenizer, save
from ffn.gpt.transformer import Transformer, TransformerConfig

CONFIG = TransformerConfig(vocab_size=7, dim=8, num_layers=2, num_heads=2, max_seq_len=8)


def same(model: torch.nn.Module, other: torch.nn.Module) -> bool:
    pairs = zip(model.state_dict().items(), other.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


@pytest.mark.parametrize("form", ["ffn", "hf"])
def test_load_reads_both_formats_of_save(form: Literal["ffn", "hf"], tmp_path: Path) -> None:
    model = Transformer(CONFIG)
    save(tmp_path / form, model, format=form)
    half = load(tmp_path / form, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert same(load(tmp_path / form), model)
    assert same(half, model.to(torch.bfloat16))
    with pytest.raises(ValueError, match=r"^format .*'gguf'"):
        save(tmp_path, model, format="gguf")  # type: ignore[arg-type]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_model_loads_as_it_was(tied: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    config = TransformerConfig(**{**CONFIG.__dict__, "tie_embeddings": tied, "position": "learned"})
    model = Transformer(config).to(dtype)
    save(tmp_path / "m", model)
    state = torch.get_rng_state()
    for path in (tmp_path / "m", tmp_path / "m" / "model.safetensors", str(tmp_path / "m")):
        loaded = load(path)
        assert loaded.config == config
        assert same(loaded, model)
        assert not loaded.training
        assert {p.dtype for p in loaded.parameters()} == {dtype}
    assert torch.equal(torch.get_rng_state(), state), "loading draws no random numbers"
    first = (tmp_path / "m" / "model.safetensors").read_bytes()
    save(tmp_path / "m", loaded)
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == first, "equal weights are equal files"
    tokens = torch.randint(7, (1, 8))
    assert torch.equal(loaded(tokens), model.eval()(tokens))


def test_a_path_without_a_good_model_is_refused(tmp_path: Path) -> None:
    def refused(*words: str) -> None:
        with pytest.raises(ValueError, match=".*".join(words)) as caught:
            load(tmp_path)
        assert "\n" not in str(caught.value)

    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)
    refused("neither", "checkpoint", r"model\.safetensors")
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(1)}, file)
    refused(r"model\.safetensors", "config")
    save_file({"norm.weight": torch.zeros(3), "nose": torch.zeros(1)}, file, {"config": CONFIG.to_toml()})
    refused("missing embedding", "unexpected nose", r"norm.weight is \(3,\)")
    save_file({"nose": torch.zeros(1)}, file, {"config": "bogus = 1"})
    refused(r"model\.safetensors", "bogus")
    save(tmp_path, Transformer(CONFIG))
    file.write_bytes(file.read_bytes()[:-1])
    refused(r"model\.safetensors")


def test_a_path_that_cannot_be_written_raises_oserror(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(OSError, match="file"):
        save(blocked / "model", Transformer(CONFIG))
    with pytest.raises(ValueError, match=r"^path must be a folder, .*file$"):
        save(blocked, Transformer(CONFIG))


@pytest.mark.parametrize("form", ["ffn", "hf"])
def test_a_full_disk_leaves_no_new_folder(
    form: Literal["ffn", "hf"], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "there").mkdir()
    monkeypatch.setattr(os, "fsync", full)
    for name in ("there", "new"):
        with pytest.raises(OSError, match="No space left on device"):
            save(tmp_path / name, Transformer(CONFIG), format=form)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    assert not list((tmp_path / "there").iterdir())


@pytest.mark.parametrize("name", ["config.json", "state.json"])
def test_save_spoils_no_folder_of_another_kind(name: str, tmp_path: Path) -> None:
    model = Transformer(TransformerConfig(vocab_size=50, dim=32, num_layers=1, num_heads=2, max_seq_len=16))
    (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match=r"^path must be a folder of its own"):
        save(tmp_path, model)
    assert [file.name for file in tmp_path.iterdir()] == [name]
