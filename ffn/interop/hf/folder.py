"""A folder of Hugging Face as a Transformer, and back: config.json, safetensors, tokenizer.json.

    model = load_folder(FOLDER)          # checked whole before anything is allocated, then copied into place
    save_folder(FOLDER, model)           # transformers' from_pretrained(FOLDER) gives the same numbers

Tensors are views of their files: what loading allocates is the model.
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
Parts = dict[str, list[tuple[str, Weight]]]  # the name of one of their tensors -> ours within it


def is_folder(path: str | Path) -> bool:
    """Whether a path is a folder of Hugging Face, or a file of weights in one: config.json tells."""
    path = Path(path)
    return ((path if path.is_dir() else path.parent) / CONFIG).is_file()


def load_folder(
    path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> Transformer:
    """The model of a folder, or of one file of weights with config.json beside it; in eval mode.

    Args:
        dtype: of the model; left out, that of the tensors, which then have to agree on one.

    Raises:
        ValueError: one line: what is absent, damaged, misfits or is not supported. A pickle is read only by
            its own path.
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
    """Write config.json, the weights in their dtype and, if given, tokenizer.json; nothing else is touched.

    Args:
        architecture: transformers' model_type, as "llama"; left out, the one the model was loaded from, else
            the first that can say what the model's config says.

    Raises:
        ValueError: an option of the model has no place there. OSError leaves what was there.
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
    """The config of a folder (or of its config.json, or of a file beside it), without a look at the weights.

    Also what a Transformer's config has no place for: the model_type and the numbers of the special tokens.
    """
    path = Path(path)
    file = path if path.name == CONFIG else (path if path.is_dir() else path.parent) / CONFIG
    keys = read_json(file)
    for key in ("num_hidden_layers", "n_layer", "n_layers"):  # so many that even their list would not fit
        if isinstance(keys.get(key), int) and keys[key] > MAX_LAYERS:
            raise ValueError(f"{file}: {key}={short(keys[key])}: want {MAX_LAYERS:,} at most")
    try:
        config = read_config(keys)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    pad = keys.get("pad_token_id")
    if pad is not None and type(pad) is not int:
        raise ValueError(f"{file}: pad_token_id={short(pad)}: want a token's number, or null")
    if pad is not None and not 0 <= pad < config.vocab_size:  # as -1, which some write for none
        del keys["pad_token_id"]
    return config, {key: keys[key] for key in ("model_type", *TOKENS) if key in keys}


def fitting_architecture(config: TransformerConfig) -> str:
    """The first model_type whose config.json can say what this config does; ValueError says why none can."""
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
    nearest = min(reasons, key=lambda reason: ("cannot say" not in reason, len(reason)))  # the fewest options
    raise ValueError(f"no architecture of Hugging Face fits this model; the nearest, {nearest}")


def _keys(model: Transformer, architecture: str) -> dict[str, Any]:
    keys = write_config(model.config, architecture)
    keys |= {key: (model.origin or {}).get(key) for key in TOKENS if keys.get(key) is None}
    return keys | {"dtype": str(model.embedding.weight.dtype).removeprefix("torch.")}


def _plan(path: Path, config: TransformerConfig, architecture: str, shards: Shards) -> Parts:
    """Which of our tensors lie in which of the files' tensors; ValueError where the sets do not match."""
    if config.num_layers > len(shards):  # said before so many layers are built, if only without memory
        raise ValueError(f"{path}: {CONFIG} asks for {config.num_layers} layers of {len(shards)} tensors")
    try:
        rows = weights(config, architecture)
    except (RuntimeError, TypeError) as error:  # of torch, for sizes beyond 64 bits
        raise ValueError(f"{path}: {CONFIG} asks for impossible sizes: {one_line(error)}") from None
    wanted = _by_theirs(rows)
    found: dict[str, str] = {}
    wrong = []
    for name, theirs in match_names(shards, config, architecture).items():
        if theirs not in wanted:
            wrong.append(f"unexpected {name!a}")
        elif theirs in found:
            wrong.append(f"{name!a} and {found[theirs]!a} are one")
        else:
            found[theirs] = name
    wrong += [f"missing {name}" for name in wanted if name not in found]
    for theirs, name in found.items():
        spec, shape = shards.specs[name], wanted[theirs][0][1].shape
        if spec.shape != tuple(shape) or not spec.dtype.is_floating_point:
            got = f"{spec.shape} {str(spec.dtype).removeprefix('torch.')}"
            wrong.append(f"{name} is {got}, the config wants {tuple(shape)} of floats")
    if wrong:
        more = f"; and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise ValueError(f"{path}: other weights than {CONFIG} asks for: {'; '.join(wrong[:8])}{more}")
    _check_copies(path, shards, tied_names(shards, config, architecture))
    return {name: wanted[theirs] for theirs, name in found.items()}


def _check_copies(path: Path, shards: Shards, copies: Mapping[str, str]) -> None:
    """A tied tensor is often stored twice; where the two differ, they were not tied."""
    for copy, source in copies.items():
        one, other = shards.specs[copy], shards.specs[source]
        if one[1:] != other[1:] or not shards[copy].equal(shards[source]):
            raise ValueError(
                f"{path}: {copy!a} is another than {source}, and {CONFIG} says that they are tied"
            )


def _dtype_of(path: Path, shards: Shards, parts: Parts) -> torch.dtype:
    dtypes = sorted({str(shards.specs[name].dtype).removeprefix("torch.") for name in parts})
    if len(dtypes) != 1:
        raise ValueError(f"{path}: holds tensors of {' and '.join(dtypes)}; choose one for all with dtype=")
    return getattr(torch, dtypes[0])


def _by_theirs(rows: Mapping[str, Weight]) -> Parts:
    parts: Parts = {}
    for ours, row in rows.items():
        parts.setdefault(row.name, []).append((ours, row))
    return parts


def _check_model(model: Transformer, parts: Parts) -> None:
    names = {ours for rows in parts.values() for ours, _ in rows}
    if other := sorted(names ^ model.state_dict().keys()):
        raise ValueError(f"the model has other weights than its config's: {', '.join(other[:8])}")


@torch.no_grad()
def _copy(model: Transformer, parts: Parts, tensors: Iterable[tuple[str, Tensor]]) -> None:
    ours = model.state_dict()
    for name, theirs in tensors:
        for our_name, row in parts[name]:
            row.load(ours[our_name], theirs)
