"""A folder of Hugging Face as a Transformer, and back: config.json, safetensors, tokenizer.json.

    model = load_folder(FOLDER)          # checked whole before anything is allocated, then copied into place
    save_folder(FOLDER, model)           # transformers' from_pretrained(FOLDER) gives the same numbers

Tensors are views of their files: what loading allocates is the model.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ffn.interop.hf.config import read_config, write_config
from ffn.interop.hf.tables import TABLES, Weight, match_names, weights
from ffn.interop.shards import MAX_SHARD_BYTES, Shards, open_shards, read_json, write_shards
from ffn.interop.untrusted import one_line
from ffn.tokenizer import HFTokenizer
from ffn.transformer import Transformer, TransformerConfig

CONFIG, TOKENIZER = "config.json", "tokenizer.json"
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "cls_token_id")
TRAINING = (
    "dropout",
    "ffn_dropout",
    "attention_dropout",
    "save",
    "chunk_tokens",
    "init",
)  # change no numbers
Parts = dict[str, list[tuple[str, Weight]]]  # the name of a tensor in a file -> our names within it


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


def load_into(model: Transformer, path: str | Path) -> None:
    """Copy a folder's weights into a model of its own, in the model's dtype and on its device.

    Raises:
        ValueError: as `load_folder`, and where the model is of another config; it is left as it was.
    """
    config, origin = read_folder_config(path)
    there, here = (dataclasses.asdict(_plain(c)) for c in (config, model.config))
    if other := [
        f"{key}={here[key]!r} where it has {there[key]!r}" for key in here if here[key] != there[key]
    ]:
        raise ValueError(f"{path}: of another config than the model, which has {', '.join(other)}")
    shards = open_shards(path)
    parts = _plan(Path(path), config, origin["model_type"], shards)
    _check_model(model, {ours for rows in parts.values() for ours, _ in rows})
    tensors = {name: shards[name] for name in parts}  # all at once: after this no file can be refused
    _copy(model, parts, tensors.items())
    model.origin = origin


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
    config, origin = _plain(model.config), model.origin
    if architecture is None:
        architecture = str(origin["model_type"]) if origin else fitting_architecture(config)
    keys = write_config(config, architecture)
    keys |= {key: value for key, value in (origin or {}).items() if key in TOKENS}
    ours, theirs = model.state_dict(), {}
    for name, row in weights(config, architecture).items():
        theirs.setdefault(row.name, []).append((name, row))
    _check_model(model, {name for rows in theirs.values() for name, _ in rows})
    keys["dtype"] = str(model.embedding.weight.dtype).removeprefix("torch.")

    def read(name: str) -> Tensor:
        rows = theirs[name]
        tensor = torch.zeros(rows[0][1].shape, dtype=ours[rows[0][0]].dtype)
        for our_name, row in rows:
            row.store(tensor, ours[our_name])
        return tensor

    sizes = {
        name: torch.Size(rows[0][1].shape).numel() * ours[rows[0][0]].element_size()
        for name, rows in theirs.items()
    }
    texts = {CONFIG: json.dumps(keys, indent=2, sort_keys=True) + "\n"}
    if tokenizer is not None:
        texts[TOKENIZER] = tokenizer.specification
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
    try:
        config = TransformerConfig.from_dict(
            dataclasses.asdict(read_config(keys)), ""
        )  # which checks the kinds
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    except (TypeError, KeyError, AttributeError, OverflowError) as error:
        raise ValueError(f"{file}: a value is absent or of another kind ({one_line(repr(error))})") from None
    return config, {key: keys[key] for key in ("model_type", *TOKENS) if key in keys}


def fitting_architecture(config: TransformerConfig) -> str:
    """The first model_type whose config.json can say what this config does; ValueError says why none can."""
    reasons = []
    for architecture in TABLES:
        try:
            write_config(config, architecture)
        except ValueError as error:
            reasons.append(str(error))
        else:
            return architecture
    raise ValueError(f"no architecture of Hugging Face fits this model: {'; '.join(reasons)}")


def _plan(path: Path, config: TransformerConfig, architecture: str, shards: Shards) -> Parts:
    """Which of our tensors lie in which of the files' tensors; ValueError where the sets do not match."""
    if config.num_layers > len(shards):  # said before so many layers are built, if only without memory
        raise ValueError(f"{path}: {CONFIG} asks for {config.num_layers} layers of {len(shards)} tensors")
    try:
        rows = weights(config, architecture)
    except (RuntimeError, TypeError) as error:  # of torch, for sizes beyond 64 bits
        raise ValueError(f"{path}: {CONFIG} asks for impossible sizes: {one_line(error)}") from None
    wanted: dict[str, list[tuple[str, Weight]]] = {}
    for ours, row in rows.items():
        wanted.setdefault(row.name, []).append((ours, row))
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
    parts = {name: wanted[theirs] for theirs, name in found.items()}
    _check_copies(path, shards, parts)
    return parts


def _check_copies(path: Path, shards: Shards, parts: Parts) -> None:
    """A tied head is often stored as well; one that is another than the token table was not tied."""
    table = next(name for name, rows in parts.items() if rows[0][0] == "embedding.token.weight")
    for name in shards.specs.keys() - parts.keys():
        copy, wanted = shards.specs[name], shards.specs[table]
        if copy.shape == wanted.shape and (
            copy.dtype != wanted.dtype or not shards[name].equal(shards[table])
        ):
            raise ValueError(
                f"{path}: {name!a} is another than {table}, and {CONFIG} says that they are tied"
            )


def _dtype_of(path: Path, shards: Shards, parts: Parts) -> torch.dtype:
    dtypes = sorted({str(shards.specs[name].dtype).removeprefix("torch.") for name in parts})
    if len(dtypes) != 1:
        raise ValueError(f"{path}: holds tensors of {' and '.join(dtypes)}; choose one for all with dtype=")
    return getattr(torch, dtypes[0])


def _check_model(model: Transformer, names: set[str]) -> None:
    state = model.state_dict()
    if other := sorted(set(state) ^ names):
        raise ValueError(f"the model has other weights than its config's: {', '.join(other[:8])}")


@torch.no_grad()
def _copy(model: Transformer, parts: Parts, tensors: Iterable[tuple[str, Tensor]]) -> None:
    ours = model.state_dict()
    for name, theirs in tensors:
        for our_name, row in parts[name]:
            row.load(ours[our_name], theirs)


def _plain(config: TransformerConfig) -> TransformerConfig:
    """What a config says about the numbers that come out, with every size spelled out."""
    usual = {field.name: field.default for field in dataclasses.fields(config) if field.name in TRAINING}
    heads = {"num_kv_heads": config.kv_heads, "head_dim": config.head_channels}
    return dataclasses.replace(config, **usual, **heads, hidden_dim=config.hidden_width)
