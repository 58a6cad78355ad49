"""Checkpoint folders: good ones are read; damaged ones and those of another run are refused."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ffn.files.checkpoints import checkpoint_path, newest_checkpoint, prune, read_state, write_state

IDENTITY = {"config": "c", "data": "d"}
NAMES = ("model.safetensors", "optimizer.safetensors", "state.json")


def write(run: Path, step: int, **state: object) -> Path:
    """A checkpoint with files of a few bytes in place of weights, which nothing here reads as such."""
    path = checkpoint_path(run, step)
    path.mkdir(parents=True)
    for name in NAMES[:2]:
        (path / name).write_bytes(f"{name} after step {step}".encode())
    write_state(path, step, {**IDENTITY, **state})
    return path


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two good checkpoints; tests put back what they change."""
    run = tmp_path_factory.mktemp("good")
    for step in (10, 20):
        write(run, step, progress={"step": step})
    return run


def refused(said: list[str]) -> list[str]:
    return [line.partition(": ")[0] for line in said]


@settings(max_examples=60)
@given(name=st.sampled_from(NAMES), place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_is_refused_and_the_checkpoint_before_is_used(
    good: Path, name: str, place: float, bit: int
) -> None:
    file = checkpoint_path(good, 20) / name
    content = file.read_bytes()
    state, at = read_state(file.parent), int(place * len(content))
    said: list[str] = []
    try:
        file.write_bytes(content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :])
        newest = newest_checkpoint(good, IDENTITY, said.append)
    finally:
        file.write_bytes(content)
    assert newest is not None
    if newest[0].name == "step-000020":  # a flip that keeps the meaning of the JSON, as in its white space
        assert (name, newest[1], said) == ("state.json", state, [])
    else:
        assert newest[0].name == "step-000010"
        assert refused(said) == ["checkpoint step-000020 refused"]
        assert name in said[0]


@given(name=st.sampled_from(NAMES), share=st.floats(0, 1, exclude_max=True))
def test_a_truncated_file_is_refused(good: Path, name: str, share: float) -> None:
    file = checkpoint_path(good, 20) / name
    content = file.read_bytes()
    try:
        file.write_bytes(content[: int(share * (len(content) - 1))])
        with pytest.raises(ValueError, match=f"checkpoint step-000020 refused: {name}"):
            read_state(file.parent, IDENTITY)
    finally:
        file.write_bytes(content)


def test_a_checkpoint_of_another_run_or_format_is_refused(good: Path, tmp_path: Path) -> None:
    run = shutil.copytree(good, tmp_path / "run")
    path = checkpoint_path(run, 20)
    assert read_state(path, IDENTITY)["progress"] == {"step": 20}
    with pytest.raises(ValueError, match=r"step-000020 refused: .* data"):
        read_state(path, {**IDENTITY, "data": "x"})
    state = json.loads((path / "state.json").read_text())
    for change, reason in (({"format": 2}, "format 2"), ({"step": 21}, "altered")):
        (path / "state.json").write_text(json.dumps({**state, **change}))
        with pytest.raises(ValueError, match=f"step-000020 refused: .*{reason}"):
            read_state(path)
    said: list[str] = []
    assert newest_checkpoint(run, {"config": "other"}, said.append) is None
    assert refused(said) == ["checkpoint step-000020 refused", "checkpoint step-000010 refused"]


def test_prune_keeps_the_last_and_the_best(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 5):
        write(tmp_path, step)
    (tmp_path / "checkpoints" / ".step-000006.partial").mkdir()
    prune(tmp_path, 4, keep=2, best="step-000001")
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-000001", "step-000003", "step-000004", "step-000005"]
