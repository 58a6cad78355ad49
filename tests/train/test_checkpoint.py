"""A checkpoint restores a training run exactly, or changes nothing."""

import errno
import os
from pathlib import Path

import pytest
import torch

from ffn.disk import load, load_tokenizer
from ffn.files.checkpoints import read_state
from ffn.gpt.transformer import Transformer, TransformerConfig
from ffn.text.tokenizer import CharTokenizer
from ffn.train.checkpoint import restore, save_checkpoint
from ffn.train.optim import ScheduledOptimizer

CONFIG = TransformerConfig(vocab_size=7, dim=8, num_layers=2, num_heads=2, max_seq_len=8)
IDENTITY = {"config": "c", "data": "d"}


def trained(config: TransformerConfig = CONFIG, steps: int = 2) -> tuple[Transformer, ScheduledOptimizer]:
    model = Transformer(config)
    optimizer = ScheduledOptimizer(model, "muon")
    tokens = torch.randint(7, (2, 9))
    for _ in range(steps):
        model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def save(run: Path, step: int, pair: tuple[Transformer, ScheduledOptimizer], **state: object) -> Path:
    return save_checkpoint(run, step, *pair, {**IDENTITY, **state})


def same(model: torch.nn.Module, other: torch.nn.Module) -> bool:
    pairs = zip(model.state_dict().items(), other.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


def test_a_run_loads_as_its_best_checkpoint_with_its_tokenizer(tmp_path: Path) -> None:
    first, second = trained(), trained()
    save(tmp_path, 10, first, best="step-000010")
    save(tmp_path, 20, second, best="step-000010")
    assert same(load(tmp_path), first[0])
    assert same(load(tmp_path / "checkpoints" / "step-000020"), second[0])
    CharTokenizer("abc").save(tmp_path / "tokenizer.json")
    model = tmp_path / "checkpoints" / "step-000010" / "model.safetensors"
    for path in (tmp_path, tmp_path / "tokenizer.json", model.parent, model):
        assert load_tokenizer(path).encode("cab") == [2, 0, 1]
    model.unlink()
    with pytest.warns(UserWarning, match=r"step-000010 refused: model\.safetensors is absent"):
        assert same(load(tmp_path), second[0])


@pytest.mark.parametrize("named", ["folder", "file"])
def test_loading_a_checkpoint_by_its_path_verifies_it(named: str, tmp_path: Path) -> None:
    path = save(tmp_path, 20, trained())
    model = path / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-1] + b"X")
    with pytest.raises(ValueError, match=r"step-000020 refused: model\.safetensors"):
        load(path if named == "folder" else model)


def test_restore_gives_weights_optimizer_and_random_state(tmp_path: Path) -> None:
    pair = trained()
    path = save(tmp_path, 5, pair)
    drawn = torch.rand(3)
    other = trained(steps=0)
    restore(path, *other)
    assert torch.equal(torch.rand(3), drawn)
    assert same(pair[0], other[0])
    for name, tensor in pair[1].state_tensors().items():
        assert torch.equal(tensor, other[1].state_tensors()[name])


def test_restore_of_a_misfit_changes_nothing(tmp_path: Path) -> None:
    path = save(tmp_path, 5, trained())
    other = trained(TransformerConfig(**{**CONFIG.__dict__, "hidden_dim": 24}))
    weights = {name: tensor.clone() for name, tensor in other[0].state_dict().items()}
    state, random = other[1].state_tensors(), torch.get_rng_state()
    state = {name: tensor.clone() for name, tensor in state.items()}
    with pytest.raises(ValueError, match=r"gate_proj.weight is \(128, 8\) float32, expected \(24, 8\)"):
        restore(path, *other)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in other[0].state_dict().items())
    assert all(torch.equal(tensor, state[name]) for name, tensor in other[1].state_tensors().items())
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("call", range(8))
def test_a_full_disk_loses_no_checkpoint(call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The `call`-th flush to the disk fails, up to the last one before the checkpoint gets its name."""
    pair = trained()
    save(tmp_path, 10, pair, best="step-000010")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    calls = iter(range(100))

    def fsync(descriptor: int, real=os.fsync) -> None:
        if next(calls) == call:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(OSError, match="No space left on device"):
            save(tmp_path, 20, pair)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    save(tmp_path, 20, pair)
    assert read_state(tmp_path / "checkpoints" / "step-000020", IDENTITY)["step"] == 20
