"""Transformers on disk: safetensors with the config in the header, or a Hugging Face folder; never pickle.

    ffn.save(FOLDER, model)
    model = ffn.load(FOLDER)          # also of a training run or one of its checkpoints

The files of a checkpoint are verified by the SHA-256 in its state.json. A model that `save` wrote has no
SHA-256 beside it: it is refused where it is cut short or its weights do not fit its config.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ffn.files.atomic import replacing
from ffn.files.checkpoints import MODEL, STATE, newest_checkpoint, read_state
from ffn.files.dataclass_toml import from_toml, to_toml
from ffn.files.shards import Shards, has_shards, open_shards, write_tensors
from ffn.gpt.adapters import AdapterConfig, adapter_config, add_adapters
from ffn.gpt.transformer import Transformer, TransformerConfig
from ffn.interop.hf import folder as hf
from ffn.text import tokenizer

ADAPTERS = "\n[adapters]\n"


class Found(NamedTuple):
    """A model on disk: its file or Hugging Face folder, and the verified state of its checkpoint, if any."""

    file: Path
    state: dict[str, Any] | None


def save(path: str | Path, model: Transformer, format: Literal["ffn", "hf"] = "ffn") -> None:
    """Write a folder that `load` reads.

    Args:
        path: the folder; it is made where absent.
        format: "ffn" writes model.safetensors with the config in its header; "hf" writes a Hugging Face
            folder, which transformers' from_pretrained reads too.

    Raises:
        ValueError: no such format; path is a file; a Hugging Face model or a training checkpoint in the
            folder, which "ffn" would spoil; or an option of the model that a Hugging Face config cannot
            express.
        OSError: the disk is full or fails; the files that were there stay, and a new folder is removed.
    """
    writers = {"ffn": save_model, "hf": hf.save_folder}
    if format not in writers:
        raise ValueError(f"format must be one of {', '.join(writers)}, got {format!r}")
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"path must be a folder, got the file {path}")
    if format == "ffn":
        for name, kind in ((hf.CONFIG, "a Hugging Face model"), (STATE, "the checkpoint of a run")):
            if (folder / name).exists():
                raise ValueError(f"path must be a folder of its own, got {path}, which holds {kind}")
    made = not folder.exists()
    try:
        writers[format](folder, model)
    except BaseException:
        if made and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
        raise


def save_model(path: str | Path, model: Transformer) -> None:
    """Write `path/model.safetensors`: the weights, and the config in the header. Atomic; `load` reads it."""
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / MODEL) as partial:
        write_tensors(partial, _tensors(model), {"config": _header(model)})


def load(
    path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> Transformer:
    """Return the model at a path, in eval mode.

    Args:
        path: the folder of a training run (its best checkpoint, else its last), a checkpoint, a folder that
            `save` wrote, or a Hugging Face folder: config.json beside safetensors. Of a classifier's folder
            the backbone is returned; `ffn.classify.load_classifier` reads it with its head.
        dtype: of the model; left out, the dtype in which it was saved.

    Raises:
        ValueError: there is no model, or it is damaged or not supported.
    """
    return read_model(find_model(path).file, device, dtype)


def read_model(
    file: Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> Transformer:
    """Return the model in a model file or Hugging Face folder that `find_model` verified; see `load`."""
    if hf.is_folder(file):
        return hf.load_folder(file, device, dtype)
    shards = open_shards(file)
    config, adapters = _configs(file, shards.metadata)
    dtypes = {spec.dtype for spec in shards.specs.values() if spec.dtype.is_floating_point}
    saved = dtypes.pop() if len(dtypes) == 1 else None
    model = Transformer(config, device="meta", dtype=saved)
    if adapters is not None:
        add_adapters(model, adapters)
    tensors = matching_tensors(file, shards, model)
    model.to_empty(device=device)
    copy_tensors(tensors, model)
    return model.to(dtype=dtype).eval()


def inspect(path: str | Path) -> tuple[TransformerConfig, str, Shards | None]:
    """Return a model's config, its architecture's name and the headers of its files, without its weights.

    Args:
        path: a folder or a file that `load` reads, or a Hugging Face config.json. Nothing is hashed.

    Returns:
        The headers are None where a Hugging Face config has no safetensors beside it.
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
    """Return the tokenizer of a training run, a checkpoint in one, or a Hugging Face folder, or in a file.

    Args:
        path: the folder, its model file, or a tokenizer.json.

    Raises:
        ValueError: there is no tokenizer.json, or it cannot be read. ImportError: tokenizers is missing.
    """
    path = Path(path)
    path = path.parent if path.suffix == ".safetensors" else path
    for candidate in (path, path / "tokenizer.json", path.parent.parent / "tokenizer.json"):
        if candidate.is_file():
            return tokenizer.load_tokenizer(candidate)
    raise ValueError(f"{path}: no tokenizer.json there")


def find_model(path: str | Path, say: Callable[[str], None] = warnings.warn) -> Found:
    """Find the model that `load` reads and verify it where it is a checkpoint; each file is hashed once.

    Args:
        path: see `load`.
        say: is told each checkpoint that is refused, with the reason.

    Raises:
        ValueError: there is no model, or it is damaged.
    """
    path = Path(path)
    if hf.is_folder(path):
        return Found(path, None)
    if path.is_file() or (path / MODEL).is_file():
        file = path if path.is_file() else path / MODEL
        return Found(file, read_state(file.parent) if (file.parent / STATE).exists() else None)
    newest = newest_checkpoint(path, {}, say)
    if newest is None:
        raise ValueError(f"{path}: neither a run of ffn with a good checkpoint nor a folder with {MODEL}")
    folder, state = newest
    best = path / "checkpoints" / (state.get("best") or folder.name)
    if best != folder:
        try:
            folder, state = best, read_state(best)
        except ValueError as error:
            say(f"{error}; using {folder.name} in its place")
    return Found(folder / MODEL, state)


def matching_tensors(file: Path, shards: Shards, model: nn.Module) -> dict[str, Tensor]:
    """Return a file's tensors; ValueError unless names, shapes and dtypes are the model's."""

    def kind(tensor: Tensor) -> str:
        return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"

    tensors, wanted = dict(shards), _tensors(model)
    wrong = [f"missing {name}" for name in wanted if name not in tensors]
    wrong += [f"unexpected {name}" for name in tensors if name not in wanted]
    wrong += [
        f"{name} is {kind(tensors[name])}, expected {kind(tensor)}"
        for name, tensor in wanted.items()
        if name in tensors and kind(tensors[name]) != kind(tensor)
    ]
    if wrong:
        raise ValueError(f"{file}: its weights do not fit the model: {'; '.join(wrong)}")
    return tensors


@torch.no_grad()
def copy_tensors(tensors: Mapping[str, Tensor], model: nn.Module) -> None:
    """Copy the tensors of `matching_tensors` into the model's parameters and buffers."""
    own = _tensors(model)
    for name, tensor in tensors.items():
        own[name].copy_(tensor)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name; a tensor with several names (a tied head) has its first."""
    found: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        found.setdefault(id(tensor), (name, tensor))
    return dict(found.values())


def _header(model: Transformer) -> str:
    """The config as TOML, followed by a table of the adapters where there are any."""
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
