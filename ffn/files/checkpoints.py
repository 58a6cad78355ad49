"""The checkpoints of a run: their folders and names, and the state.json that verifies every byte of them.

    RUN/checkpoints/step-000400/model.safetensors      weights
                                optimizer.safetensors  optimizer state and random generators
                                state.json             progress, identity of the run, SHA-256 of the files

A checkpoint that is truncated, altered or of another run is refused with a reason.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ffn.files.atomic import remove_folder, sha256_file, write_file

FORMAT = 1
MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"


def checkpoint_path(run: Path, step: int) -> Path:
    """Return the folder of the checkpoint after `step` steps."""
    return run / "checkpoints" / f"step-{step:06d}"


def list_checkpoints(run: Path) -> list[Path]:
    """Return the checkpoints of a run, good or not, the oldest first."""
    found = [p for p in (run / "checkpoints").glob("step-*") if p.is_dir() and p.name[5:].isdecimal()]
    return sorted(found, key=lambda path: int(path.name[5:]))


def newest_checkpoint(
    run: Path, identity: Mapping[str, str], say: Callable[[str], None]
) -> tuple[Path, dict[str, Any]] | None:
    """Return the last good checkpoint and its state; `say` is told each refused one, with the reason."""
    for path in reversed(list_checkpoints(run)):
        try:
            return path, read_state(path, identity)
        except ValueError as error:
            say(str(error))
    return None


def write_state(folder: Path, step: int, state: Mapping[str, Any]) -> None:
    """Write state.json beside the model and optimizer files of a checkpoint, with their sizes and SHA-256."""
    files = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_file(folder / name)}
        for name in (MODEL, OPTIMIZER)
    }
    content = {"format": FORMAT, "step": step, **state, "files": files}
    write_file(folder / STATE, json.dumps({**content, "sha256": _digest(content)}, indent=1) + "\n")


def read_state(path: Path, identity: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Verify every byte of a checkpoint and return its state.

    Args:
        identity: entries that the state must have, such as the fingerprints of the config and of the data.

    Raises:
        ValueError: the checkpoint is damaged or of another run; the message has its name and the reason.
    """
    refuse = f"checkpoint {path.name} refused: "
    try:
        state = json.loads((path / STATE).read_text("utf-8"))
        digest, files, form = state.pop("sha256"), state["files"], state["format"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{refuse}{STATE} is absent or damaged") from None
    if form != FORMAT:
        raise ValueError(f"{refuse}{STATE} has format {form}, this version reads {FORMAT}")
    if digest != _digest(state):
        raise ValueError(f"{refuse}{STATE} was altered")
    for name, facts in files.items():
        file = path / name
        if not file.is_file():
            raise ValueError(f"{refuse}{name} is absent")
        if file.stat().st_size != facts["bytes"]:
            raise ValueError(f"{refuse}{name} has {file.stat().st_size} bytes, expected {facts['bytes']}")
        if sha256_file(file) != facts["sha256"]:
            raise ValueError(f"{refuse}{name} was altered, its SHA-256 differs")
    for key, value in (identity or {}).items():
        if state.get(key) != value:
            raise ValueError(f"{refuse}it belongs to another run, its {key} differs")
    return state


def prune(run: Path, step: int, keep: int, best: str | None) -> None:
    """Delete leftovers of a killed run, and checkpoints up to `step` but the last `keep` and the best."""
    for leftover in (run / "checkpoints").glob(".step-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    past = [path for path in list_checkpoints(run) if int(path.name[5:]) <= step]
    for path in past[:-keep]:
        if path.name != best:
            remove_folder(path)


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
