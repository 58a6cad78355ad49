"""Checkpoints of a training run: model, optimizer and random generators, saved and restored together.

A checkpoint is written under another name, flushed to the disk and renamed: a process killed at any moment,
or a full disk, leaves the earlier checkpoints as they were.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ffn.disk import copy_tensors, matching_tensors, save_model
from ffn.files.atomic import remove_folder, replacing
from ffn.files.checkpoints import MODEL, OPTIMIZER, checkpoint_path, write_state
from ffn.files.shards import open_shards, write_tensors
from ffn.gpt.transformer import Transformer
from ffn.train.optim import ScheduledOptimizer


def save_checkpoint(
    run: Path, step: int, model: Transformer, optimizer: ScheduledOptimizer, state: Mapping[str, Any]
) -> Path:
    """Write everything that training resumes from after `step` steps and return the checkpoint's folder.

    Raises:
        OSError: the disk is full or fails; the files that were there stay.
    """
    final = checkpoint_path(run, step)
    final.parent.mkdir(exist_ok=True)
    with replacing(final) as partial:
        partial.mkdir()
        save_model(partial, model)
        tensors = {f"optimizer/{name}": tensor for name, tensor in optimizer.state_tensors().items()}
        write_tensors(partial / OPTIMIZER, tensors | random_state(), {})
        write_state(partial, step, state)
        if final.exists():  # a refused checkpoint, or one with work that was lost since
            remove_folder(final)
    return final


def restore(path: Path, model: nn.Module, optimizer: ScheduledOptimizer) -> None:
    """Restore weights, optimizer and random generators from a checkpoint.

    Raises:
        ValueError: the checkpoint does not fit the model or the optimizer; nothing has changed then.
    """
    tensors = matching_tensors(path / MODEL, open_shards(path / MODEL), model)
    rest = dict(open_shards(path / OPTIMIZER))
    prefix = "optimizer/"
    optimizer.load_state_tensors(
        {name.removeprefix(prefix): tensor for name, tensor in rest.items() if name.startswith(prefix)}
    )
    copy_tensors(tensors, model)
    set_random_state(rest)


def random_state() -> dict[str, Tensor]:
    """Return the states of torch's random generators, on the CPU and on devices in use, as bytes by name."""
    states = {"random/cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states |= {f"random/cuda{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    if torch.backends.mps.is_available():
        states["random/mps"] = torch.mps.get_rng_state()
    return states


def set_random_state(tensors: Mapping[str, Tensor]) -> None:
    """Set the states that `random_state` returned, except of devices that are absent here or had none."""
    torch.set_rng_state(tensors["random/cpu"])
    for i in range(torch.cuda.device_count()):
        if f"random/cuda{i}" in tensors:
            torch.cuda.set_rng_state(tensors[f"random/cuda{i}"], i)
    if torch.backends.mps.is_available() and "random/mps" in tensors:
        torch.mps.set_rng_state(tensors["random/mps"])
