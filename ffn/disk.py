"""Models and training states on disk: safetensors and JSON, never pickle; whole and verified, or refused.

    RUN/tokenizer.json
    RUN/checkpoints/step-000400/model.safetensors      weights; in the header the configs as TOML
                                optimizer.safetensors  optimizer state and random generators
                                state.json             progress, identity of the run, SHA-256 of the files

A checkpoint is written under another name, flushed and renamed, so a process killed at any moment, or a full
disk, leaves those that were there. What is truncated, altered or of another run is refused with its reason.
A model that `save_model` wrote alone has no SHA-256 beside it: there only what is cut short or has other
weights than its config asks for is refused.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ffn.files.atomic import publish, remove_folder, sha256_file, temporary_name, write_file
from ffn.files.dataclass_toml import from_toml, to_toml
from ffn.files.shards import Shards, has_shards, open_shards, write_tensors
from ffn.gpt.adapters import AdapterConfig, adapter_config, add_adapters
from ffn.gpt.transformer import Transformer, TransformerConfig
from ffn.interop.hf import folder as hf
from ffn.text import tokenizer
from ffn.train.device import random_state, set_random_state
from ffn.train.optim import ScheduledOptimizer

FORMAT = 1
MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
ADAPTERS = "\n[adapters]\n"
Report = Callable[[str], None]


def save(path: str | Path, model: Transformer, format: Literal["ffn", "hf"] = "ffn") -> None:
    """Write a folder that `load` reads: in our format (`save_model`) or Hugging Face's (`hf.save_folder`)."""
    writers = {"ffn": save_model, "hf": hf.save_folder}
    if format not in writers:
        raise ValueError(f"format={format!r}: want one of {', '.join(writers)}")
    writers[format](path, model)


def save_model(path: str | Path, model: Transformer) -> None:
    """Write `path/model.safetensors`: the weights, and the config in the header. Atomic; `load` reads it."""
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    partial = temporary_name(folder / MODEL)
    try:
        write_tensors(partial, _tensors(model), {"config": _header(model)})
        publish(partial, folder / MODEL)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def load(
    path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> Transformer:
    """The model of a run's folder (its best checkpoint, else its last), of a checkpoint, of `save`, or of a
    folder of Hugging Face: config.json beside safetensors. Of one that sorts texts it is the backbone, which
    `ffn.classify.load_classifier` reads with its head. In eval mode, in `dtype` or else that it was saved in.

    Raises:
        ValueError: no model there, or one that is damaged or foreign.
    """
    file = find_model(path)
    if hf.is_folder(file):
        return hf.load_folder(file, device, dtype)
    tensors, metadata = _read_tensors(file)
    config, adapters = _configs(file, metadata)
    dtypes = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    saved = dtypes.pop() if len(dtypes) == 1 else None
    model = Transformer(config, device="meta", dtype=saved)
    if adapters is not None:
        add_adapters(model, adapters)
    _check(file, tensors, _tensors(model))
    model.to_empty(device=device)
    _copy(tensors, _tensors(model))
    return model.to(dtype=dtype).eval()


def inspect(path: str | Path) -> tuple[TransformerConfig, str, Shards | None]:
    """What is known of a model without its weights: the config, its architecture's name, and what the headers
    of its files say, if there are any.

    Args:
        path: a folder or a file that `load` reads, or a config.json of Hugging Face. Nothing is hashed.
    """
    path = Path(path)
    if hf.is_folder(path):
        config, origin = hf.read_folder_config(path)
        return config, origin["model_type"], open_shards(path) if has_shards(path) else None
    file = path if path.is_file() else path / MODEL
    if not file.is_file():
        raise ValueError(f"{path}: no model there, neither {MODEL} nor a config")
    shards = open_shards(file)
    return _configs(file, shards.metadata)[0], "ffn", shards


def load_tokenizer(path: str | Path) -> tokenizer.Tokenizer:
    """The tokenizer of a run's folder, of a checkpoint within one, of Hugging Face's folder, or in a file. A
    model's file stands for its folder.

    Raises:
        ValueError: no tokenizer.json there, or none that can be read. ImportError: tokenizers is missing.
    """
    path = Path(path)
    path = path.parent if path.suffix == ".safetensors" else path
    for candidate in (path, path / "tokenizer.json", path.parent.parent / "tokenizer.json"):
        if candidate.is_file():
            return tokenizer.load_tokenizer(candidate)
    raise ValueError(f"{path}: no tokenizer.json there")


def find_model(path: str | Path, report: Report = warnings.warn) -> Path:
    """The model file (or folder of Hugging Face) that `load` reads; refused checkpoints are reported."""
    path = Path(path)
    if hf.is_folder(path):
        return path
    if path.is_file() or (path / MODEL).is_file():
        file = path if path.is_file() else path / MODEL
        if (file.parent / STATE).exists():
            read_state(file.parent)
        return file
    newest = newest_checkpoint(path, {}, report)
    if newest is None:
        raise ValueError(f"{path}: neither a run of ffn with a good checkpoint nor a folder with {MODEL}")
    best = path / "checkpoints" / (newest[1].get("best") or newest[0].name)
    try:
        read_state(best)
    except ValueError as error:
        report(f"{error}; using {newest[0].name} in its place")
        best = newest[0]
    return best / MODEL


def save_checkpoint(
    run: Path, step: int, model: Transformer, optimizer: ScheduledOptimizer, state: Mapping[str, Any]
) -> Path:
    """Write everything that training goes on from after `step` steps; OSError leaves what was there."""
    final = checkpoint_path(run, step)
    final.parent.mkdir(exist_ok=True)
    partial = temporary_name(final)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        save_model(partial, model)
        tensors = {f"optimizer/{name}": tensor for name, tensor in optimizer.state_tensors().items()}
        write_tensors(partial / OPTIMIZER, tensors | random_state(), {})
        files = {
            name: {"bytes": (partial / name).stat().st_size, "sha256": sha256_file(partial / name)}
            for name in (MODEL, OPTIMIZER)
        }
        content = {"format": FORMAT, "step": step, **state, "files": files}
        write_file(partial / STATE, json.dumps({**content, "sha256": _digest(content)}, indent=1) + "\n")
        if final.exists():  # one that was refused, or the work since was lost
            remove_folder(final)
        publish(partial, final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return final


def checkpoint_path(run: Path, step: int) -> Path:
    """The folder of the checkpoint after `step` steps."""
    return run / "checkpoints" / f"step-{step:06d}"


def list_checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, good or not, the oldest first."""
    found = [p for p in (run / "checkpoints").glob("step-*") if p.is_dir() and p.name[5:].isdecimal()]
    return sorted(found, key=lambda path: int(path.name[5:]))


def newest_checkpoint(
    run: Path, identity: Mapping[str, str], report: Report
) -> tuple[Path, dict[str, Any]] | None:
    """The last good checkpoint and its state; those refused are reported by name and reason."""
    for path in reversed(list_checkpoints(run)):
        try:
            return path, read_state(path, identity)
        except ValueError as error:
            report(str(error))
    return None


def read_state(path: Path, identity: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The state of a checkpoint, every byte of which is verified; ValueError names it and says why not.

    `identity` is what the state has to hold besides: the fingerprints of the config and of the data.
    """
    refuse = f"checkpoint {path.name} refused: "
    try:
        state = json.loads((path / STATE).read_text("utf-8"))
        digest, files, form = state.pop("sha256"), state["files"], state["format"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{refuse}{STATE} is absent or damaged") from None
    if form != FORMAT:
        raise ValueError(f"{refuse}its format is {form}, this version reads {FORMAT}")
    if digest != _digest(state):
        raise ValueError(f"{refuse}{STATE} was altered")
    for name, facts in files.items():
        file = path / name
        if not file.is_file():
            raise ValueError(f"{refuse}{name} is absent")
        if file.stat().st_size != facts["bytes"]:
            raise ValueError(f"{refuse}{name} has {file.stat().st_size} bytes in place of {facts['bytes']}")
        if sha256_file(file) != facts["sha256"]:
            raise ValueError(f"{refuse}{name} was altered (its SHA-256 is another)")
    for what, value in (identity or {}).items():
        if state.get(what) != value:
            raise ValueError(f"{refuse}it belongs to another run, its {what} is another")
    return state


def restore(path: Path, model: nn.Module, optimizer: ScheduledOptimizer) -> None:
    """Put weights, optimizer and random generators back; nothing changes where anything misfits."""
    tensors, _ = _read_tensors(path / MODEL)
    _check(path / MODEL, tensors, _tensors(model))
    rest, _ = _read_tensors(path / OPTIMIZER)
    optimizer.load_state_tensors(
        {n.removeprefix("optimizer/"): t for n, t in rest.items() if n.startswith("opt")}
    )
    _copy(tensors, _tensors(model))
    set_random_state(rest)


def prune(run: Path, step: int, keep: int, best: str | None) -> None:
    """Delete the checkpoints up to `step` but the last `keep` and the best, and what a kill left behind."""
    for leftover in (run / "checkpoints").glob(".step-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    past = [path for path in list_checkpoints(run) if int(path.name[5:]) <= step]
    for path in past[:-keep]:
        if path.name != best:
            remove_folder(path)


def _header(model: Transformer) -> str:
    """The config as TOML and, where there are adapters, a table of theirs."""
    adapters, text = adapter_config(model), model.config.to_toml()
    return text if adapters is None else f"{text}{ADAPTERS}{to_toml(adapters)}"


def _configs(file: Path, metadata: Mapping[str, str]) -> tuple[TransformerConfig, AdapterConfig | None]:
    if "config" not in metadata:
        raise ValueError(f"{file}: not a model of ffn, its header holds no config")
    try:
        text, table, adapters = metadata["config"].partition(ADAPTERS)
        config = TransformerConfig.from_toml(text)
        return config, from_toml(AdapterConfig, adapters) if table else None
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name; of names that share one tensor (a tied head), the first."""
    found: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        found.setdefault(id(tensor), (name, tensor))
    return dict(found.values())


def _check(file: Path, tensors: Mapping[str, Tensor], model: Mapping[str, Tensor]) -> None:
    def say(tensor: Tensor) -> str:
        return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"

    wrong = [f"missing {name}" for name in model if name not in tensors]
    wrong += [f"unexpected {name}" for name in tensors if name not in model]
    wrong += [
        f"{name} is {say(tensors[name])}, the model wants {say(wanted)}"
        for name, wanted in model.items()
        if name in tensors and say(tensors[name]) != say(wanted)
    ]
    if wrong:
        raise ValueError(f"{file}: other weights than the model's: {'; '.join(wrong)}")


@torch.no_grad()
def _copy(tensors: Mapping[str, Tensor], model: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        model[name].copy_(tensor)


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    shards = open_shards(path)
    return dict(shards), shards.metadata


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
