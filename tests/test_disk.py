"""Checkpoints: what was saved comes back; what is damaged or foreign is refused before anything changes."""

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from ffn import disk as checkpoint
from ffn.disk import (
    load,
    load_tokenizer,
    newest_checkpoint,
    read_state,
    restore,
    save_checkpoint,
    save_model,
)
from ffn.gpt.transformer import Transformer, TransformerConfig
from ffn.text.tokenizer import CharTokenizer
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


@pytest.mark.parametrize("form", ["ffn", "hf"])
def test_the_model_saves_itself(form: Literal["ffn", "hf"], tmp_path: Path) -> None:
    model = Transformer(CONFIG)
    model.save(tmp_path / form, format=form)
    half = load(tmp_path / form, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert same(load(tmp_path / form), model)
    assert same(half, model.to(torch.bfloat16))
    with pytest.raises(ValueError, match=r"^format='gguf': want one of ffn, hf$"):
        model.save(tmp_path, format="gguf")  # type: ignore[arg-type]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_model_loads_as_it_was(tied: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    config = TransformerConfig(**{**CONFIG.__dict__, "tie_embeddings": tied, "position": "learned"})
    model = Transformer(config).to(dtype)
    save_model(tmp_path / "m", model)
    state = torch.get_rng_state()
    for path in (tmp_path / "m", tmp_path / "m" / "model.safetensors", str(tmp_path / "m")):
        loaded = load(path)
        assert loaded.config == config
        assert same(loaded, model)
        assert not loaded.training
        assert {p.dtype for p in loaded.parameters()} == {dtype}
    assert torch.equal(torch.get_rng_state(), state), "loading draws no random numbers"
    first = (tmp_path / "m" / "model.safetensors").read_bytes()
    save_model(tmp_path / "m", loaded)
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == first, "equal weights are equal files"
    tokens = torch.randint(7, (1, 8))
    assert torch.equal(loaded(tokens), model.eval()(tokens))


def test_a_run_gives_its_best_checkpoint_and_its_tokenizer(tmp_path: Path) -> None:
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
    with pytest.warns(
        UserWarning, match=r"checkpoint step-000010 refused: model\.safetensors is absent; using"
    ):
        assert same(load(tmp_path), second[0])


def test_what_is_no_model_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"neither a run of ffn with a good checkpoint nor a folder with model"
    ):
        load(tmp_path)
    with pytest.raises(ValueError, match=r"no tokenizer\.json there"):
        load_tokenizer(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(1)}, file)
    with pytest.raises(
        ValueError, match=r"model\.safetensors: not a model of ffn, its header holds no config"
    ):
        load(tmp_path)
    save_file({"norm.weight": torch.zeros(3), "nose": torch.zeros(1)}, file, {"config": CONFIG.to_toml()})
    with pytest.raises(
        ValueError, match=r"^[^\n]*missing embedding[^\n]*unexpected nose; norm.weight is \(3,\)[^\n]*$"
    ):
        load(tmp_path)
    save_file({"nose": torch.zeros(1)}, file, {"config": "bogus = 1"})
    with pytest.raises(ValueError, match=r"model\.safetensors: bogus: no such key"):
        load(tmp_path)
    save_model(tmp_path, Transformer(CONFIG))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"model\.safetensors: not a safetensors file, or cut short"):
        load(tmp_path)


def test_a_checkpoint_restores_weights_optimizer_and_random_state(tmp_path: Path) -> None:
    pair = trained()
    path = save(tmp_path, 5, pair)
    drawn = torch.rand(3)
    other = trained(steps=0)
    restore(path, *other)
    assert torch.equal(torch.rand(3), drawn)
    assert same(pair[0], other[0])
    for name, tensor in pair[1].state_tensors().items():
        assert torch.equal(tensor, other[1].state_tensors()[name])


def test_a_misfit_changes_nothing(tmp_path: Path) -> None:
    path = save(tmp_path, 5, trained())
    other = trained(TransformerConfig(**{**CONFIG.__dict__, "hidden_dim": 24}))
    weights = {name: tensor.clone() for name, tensor in other[0].state_dict().items()}
    state, random = other[1].state_tensors(), torch.get_rng_state()
    state = {name: tensor.clone() for name, tensor in state.items()}
    with pytest.raises(
        ValueError, match=r"gate_proj.weight is \(128, 8\) float32, the model wants \(24, 8\) float32"
    ):
        restore(path, *other)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in other[0].state_dict().items())
    assert all(torch.equal(tensor, state[name]) for name, tensor in other[1].state_tensors().items())
    assert torch.equal(torch.get_rng_state(), random)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two good checkpoints, not to be written to."""
    run = tmp_path_factory.mktemp("good")
    torch.manual_seed(0)
    for step in (10, 20):
        save(run, step, trained(), best="step-000010", progress={"step": step})
    return run


NAMES = ("model.safetensors", "optimizer.safetensors", "state.json")


@settings(max_examples=60)
@given(name=st.sampled_from(NAMES), place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_any_flipped_bit_is_refused_and_the_one_before_used(
    good: Path, name: str, place: float, bit: int
) -> None:
    file = good / "checkpoints" / "step-000020" / name
    content = file.read_bytes()
    at = int(place * len(content))
    try:
        file.write_bytes(content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :])
        said: list[str] = []
        newest = newest_checkpoint(good, IDENTITY, said.append)
    finally:
        file.write_bytes(content)
    assert newest is not None
    if (
        newest[0].name == "step-000020"
    ):  # a flip that leaves the JSON saying the same, such as in its white space
        assert name == "state.json"
        assert not said
    else:
        assert newest[0].name == "step-000010"
        assert len(said) == 1
        assert said[0].startswith(f"checkpoint step-000020 refused: {name}")


@pytest.mark.parametrize("named", ["folder", "file"])
def test_a_damaged_checkpoint_is_refused_by_its_own_name_too(named: str, good: Path, tmp_path: Path) -> None:
    path = shutil.copytree(good / "checkpoints" / "step-000020", tmp_path / "step-000020")
    model = path / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-1] + b"X")
    with pytest.raises(ValueError, match=r"step-000020 refused: model\.safetensors was altered"):
        load(path if named == "folder" else model)


@given(name=st.sampled_from(NAMES), share=st.floats(0, 1, exclude_max=True))
def test_any_truncation_is_refused(good: Path, name: str, share: float) -> None:
    file = good / "checkpoints" / "step-000020" / name
    content = file.read_bytes()
    keep = int(share * (len(content) - 1))
    try:
        file.write_bytes(content[:keep])
        with pytest.raises(ValueError, match=f"checkpoint step-000020 refused: {name}"):
            read_state(file.parent, IDENTITY)
    finally:
        file.write_bytes(content)


def test_checkpoints_of_others_are_refused_by_reason(good: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(good, run)
    path = run / "checkpoints" / "step-000020"
    assert read_state(path, IDENTITY)["progress"] == {"step": 20}
    with pytest.raises(
        ValueError, match="step-000020 refused: it belongs to another run, its data is another"
    ):
        read_state(path, {**IDENTITY, "data": "x"})
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({**state, "format": 2}))
    with pytest.raises(ValueError, match="step-000020 refused: its format is 2, this version reads 1"):
        read_state(path)
    (path / "state.json").write_text(json.dumps({**state, "step": 21}))
    with pytest.raises(ValueError, match=r"step-000020 refused: state\.json was altered"):
        read_state(path)
    (path / "model.safetensors").unlink()
    (path / "state.json").unlink()
    said: list[str] = []
    assert newest_checkpoint(run, {"config": "other"}, said.append) is None
    assert len(said) == 2


def test_the_last_ones_and_the_best_are_kept(tmp_path: Path) -> None:
    pair = trained()
    for step in (1, 2, 3, 4, 5):
        save(tmp_path, step, pair)
    (tmp_path / "checkpoints" / ".step-000006.partial").mkdir()
    checkpoint.prune(tmp_path, 4, keep=2, best="step-000001")
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-000001", "step-000003", "step-000004", "step-000005"]


@pytest.mark.parametrize("call", range(6))
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


def test_an_error_of_the_tensor_writer_is_one_of_the_disk(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(OSError, match="file"):
        save_model(blocked / "model", Transformer(CONFIG))
    with pytest.raises(OSError, match="cannot write"):
        checkpoint.write_tensors(tmp_path / "absent" / "m", {"a": torch.zeros(1)}, {})
