"""Load a Transformer from a Hugging Face folder and save it: config.json, safetensors, tokenizer.json.

    model = load_folder(FOLDER)          # checks everything, then allocates the model and copies the weights
    save_folder(FOLDER, model)           # transformers' from_pretrained(FOLDER) gives the same outputs

Tensors are views of their files: loading allocates nothing but the model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ffn.files.shards import MAX_SHARD_BYTES, Shards, open_shards, read_json, write_shards
from ffn.files.strict_json import one_line, short
from ffn.gpt.transformer import Transformer, TransformerConfig
from ffn.interop.hf.config import FAMILIES, read_config, write_config
from ffn.interop.hf.tables import Weight, match_names, tied_names, weights
from ffn.text.tokenizer import HFTokenizer

CONFIG, TOKENIZER = "config.json", "tokenizer.json"
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "cls_token_id")
MAX_LAYERS = 10_000
Parts = dict[str, list[tuple[str, Weight]]]  # name of one of their tensors -> our tensors within it


def is_folder(path: str | Path) -> bool:
    """Return True for a Hugging Face folder, or a weights file in one: one with a config.json."""
    path = Path(path)
    return ((path if path.is_dir() else path.parent) / CONFIG).is_file()


def load_folder(
    path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> Transformer:
    """Return the model of a folder, or of one weights file beside a config.json, in eval mode.

    Args:
        path: the folder or the file. A pickle is read only if path names the file.
        device: of the model.
        dtype: of the model; by default the dtype of the tensors, if they all have the same.

    Raises:
        ValueError: something is absent, damaged, inconsistent or not supported. The message is one line.
    """
    config, origin = read_folder_config(path)
    shards = open_shards(path)
    parts = _plan(Path(path), config, origin["model_type"], shards)
    model = Transformer(config, device="meta", dtype=dtype or _dtype_of(Path(path), shards, parts))
    model.to_empty(device=device)
    _copy(model, parts, ((name, shards[name]) for name in shards if name in parts))
    model.origin = origin
    return model.eval()


def save_folder(
    path: str | Path,
    model: Transformer,
    architecture: str | None = None,
    *,
    tokenizer: HFTokenizer | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write config.json, the weights in their dtype and, if given, tokenizer.json. Other files stay.

    Args:
        architecture: transformers' model_type, such as "llama". The default is the one that the model was
            loaded from, else the first that can express the model's config.
        tokenizer: written as tokenizer.json.
        max_shard_bytes: the weights are split into files of at most this size.

    Raises:
        ValueError: the architecture cannot express an option of the model.
        OSError: a file could not be written; files that were there stay as they were.
    """
    if architecture is None:
        architecture = str(model.origin["model_type"]) if model.origin else fitting_architecture(model.config)
    texts = {CONFIG: json.dumps(_keys(model, architecture), indent=2, sort_keys=True) + "\n"}
    if tokenizer is not None:
        texts[TOKENIZER] = tokenizer.specification
    ours, theirs = model.state_dict(), _by_theirs(weights(model.config, architecture))
    _check_model(model, theirs)

    def read(name: str) -> Tensor:
        (first, row), *_ = theirs[name]
        tensor = torch.zeros(row.shape, dtype=ours[first].dtype)
        for our_name, row in theirs[name]:
            row.store(tensor, ours[our_name])
        return tensor

    sizes = {name: math.prod(row.shape) * ours[first].itemsize for name, ((first, row), *_) in theirs.items()}
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    write_shards(folder, sizes, read, texts, max_shard_bytes)


def read_folder_config(path: str | Path) -> tuple[TransformerConfig, dict[str, Any]]:
    """Return the config of a folder, with its model_type and special tokens, without reading the weights.

    Args:
        path: the folder, its config.json, or a file beside it.

    Raises:
        ValueError: config.json is absent, damaged or not supported.
    """
    path = Path(path)
    file = path if path.name == CONFIG else (path if path.is_dir() else path.parent) / CONFIG
    keys = read_json(file)
    for key in ("num_hidden_layers", "n_layer", "n_layers"):  # a list of more layers would exhaust memory
        if isinstance(keys.get(key), int) and keys[key] > MAX_LAYERS:
            raise ValueError(f"{file}: {key} must be at most {MAX_LAYERS:,}, got {short(keys[key])}")
    try:
        config = read_config(keys)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    pad = keys.get("pad_token_id")
    if pad is not None and type(pad) is not int:
        raise ValueError(f"{file}: pad_token_id must be an integer or null, got {short(pad)}")
    if pad is not None and not 0 <= pad < config.vocab_size:  # such as -1, which some write for none
        del keys["pad_token_id"]
    return config, {key: keys[key] for key in ("model_type", *TOKENS) if key in keys}


def fitting_architecture(config: TransformerConfig) -> str:
    """Return the first model_type that can express this config; ValueError with a reason if none can."""
    reasons = []
    for architecture, family in FAMILIES.items():
        if config.head not in family.classes:
            continue
        try:
            write_config(config, architecture)
        except ValueError as error:
            reasons.append(str(error))
        else:
            return architecture
    nearest = min(
        reasons, key=lambda reason: ("cannot express" not in reason, len(reason))
    )  # the fewest options
    raise ValueError(f"config fits no Hugging Face architecture; the nearest is {nearest}")


def _keys(model: Transformer, architecture: str) -> dict[str, Any]:
    keys = write_config(model.config, architecture)
    keys |= {key: (model.origin or {}).get(key) for key in TOKENS if keys.get(key) is None}
    return keys | {"dtype": str(model.embedding.weight.dtype).removeprefix("torch.")}


def _plan(path: Path, config: TransformerConfig, architecture: str, shards: Shards) -> Parts:
    """Return which of our tensors lie in which of the files' tensors; ValueError unless all of them match."""
    if config.num_layers > len(shards):  # before so many layers are built, even on meta
        raise ValueError(
            f"{path}: {CONFIG} has {config.num_layers} layers, the files only {len(shards)} tensors"
        )
    try:
        rows = weights(config, architecture)
    except (RuntimeError, TypeError) as error:  # from torch, for sizes beyond 64 bits
        raise ValueError(f"{path}: {CONFIG} has impossible sizes: {one_line(error)}") from None
    wanted = _by_theirs(rows)
    found: dict[str, str] = {}
    wrong = []
    for name, theirs in match_names(shards, config, architecture).items():
        if theirs not in wanted:
            wrong.append(f"unexpected {name!a}")
        elif theirs in found:
            wrong.append(f"{name!a} and {found[theirs]!a} for one tensor")
        else:
            found[theirs] = name
    wrong += [f"missing {name}" for name in wanted if name not in found]
    for theirs, name in found.items():
        spec, shape = shards.specs[name], wanted[theirs][0][1].shape
        if spec.shape != tuple(shape) or not spec.dtype.is_floating_point:
            got = f"{spec.shape} {str(spec.dtype).removeprefix('torch.')}"
            wrong.append(f"{name} must be {tuple(shape)} of floats, got {got}")
    if wrong:
        more = f"; and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise ValueError(f"{path}: the weights do not match {CONFIG}: {'; '.join(wrong[:8])}{more}")
    _check_copies(path, shards, tied_names(shards, config, architecture))
    return {name: wanted[theirs] for theirs, name in found.items()}


def _check_copies(path: Path, shards: Shards, copies: Mapping[str, str]) -> None:
    """Raise ValueError if a tied tensor is stored twice and the two differ."""
    for copy, source in copies.items():
        one, other = shards.specs[copy], shards.specs[source]
        if one[1:] != other[1:] or not shards[copy].equal(shards[source]):
            raise ValueError(f"{path}: {copy!a} must equal {source}: {CONFIG} says that they are tied")


def _dtype_of(path: Path, shards: Shards, parts: Parts) -> torch.dtype:
    dtypes = sorted({str(shards.specs[name].dtype).removeprefix("torch.") for name in parts})
    if len(dtypes) != 1:
        raise ValueError(
            f"{path}: the tensors have the dtypes {' and '.join(dtypes)}; choose one with dtype="
        )
    return getattr(torch, dtypes[0])


def _by_theirs(rows: Mapping[str, Weight]) -> Parts:
    parts: Parts = {}
    for ours, row in rows.items():
        parts.setdefault(row.name, []).append((ours, row))
    return parts


def _check_model(model: Transformer, parts: Parts) -> None:
    names = {ours for rows in parts.values() for ours, _ in rows}
    if other := sorted(names ^ model.state_dict().keys()):
        remedy = "; call merge_adapters first" if any("lora_" in name for name in other) else ""
        few = ", ".join(other[:4])
        raise ValueError(f"model must have the weights of its config, these differ: {few}{remedy}")


@torch.no_grad()
def _copy(model: Transformer, parts: Parts, tensors: Iterable[tuple[str, Tensor]]) -> None:
    ours = model.state_dict()
    for name, theirs in tensors:
        for our_name, row in parts[name]:
            row.load(ours[our_name], theirs)
