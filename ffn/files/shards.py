"""Tensors in safetensors files: one `model.safetensors`, or many beside `model.safetensors.index.json`.

    shards = open_shards(FOLDER)              # checks every header, reads no tensor
    shards.specs["norm.weight"].shape
    shards["norm.weight"]                     # a view of the file, in memory only while it is referenced

The safetensors library checks a header (length, JSON, offsets, sizes, dtypes). Checked here in addition: a
name that occurs twice, an index that names absent files or files outside its folder, and tensors that the
index leaves out. A pickle is read only when its own path is given, and only if it holds nothing but tensors.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ffn.files.atomic import aside, flush, publish
from ffn.files.strict_json import one_line, parse_json, read_json, short

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = {".bin", ".pt", ".pth"}
MAX_SHARD_BYTES = 5_000_000_000
_FORMAT = {"format": "pt"}  # transformers requires it
_OURS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip


class Spec(NamedTuple):
    """File, dtype and shape of one tensor, from the header."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]


class Shards(Mapping[str, Tensor]):
    """Mapping from name to tensor, in the order of the files. A tensor is read when it is accessed.

    Args:
        specs: file, dtype and shape of each tensor.
        read: returns the tensor of a name.
        metadata: the strings in the header of a single file.
    """

    def __init__(
        self, specs: dict[str, Spec], read: Callable[[str], Tensor], metadata: dict[str, str] | None = None
    ) -> None:
        self.specs, self.metadata = specs, metadata or {}
        self._read = read

    def __getitem__(self, name: str) -> Tensor:
        """Return the tensor, on the CPU, read-only; ValueError if its file has changed since opening."""
        spec, tensor = self.specs[name], self._read(name)
        if (tensor.dtype, tuple(tensor.shape)) != spec[1:]:
            raise ValueError(f"{spec.file}: {short(name)} changed while it was read")
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)


def open_shards(path: str | Path) -> Shards:
    """Open the tensors of a folder or of one file: every header is checked, no tensor is read.

    Args:
        path: a folder with `model.safetensors`, or else with `model.safetensors.index.json` and the files it
            names; or one file. A pickle (.bin, .pt, .pth) is read only when it is `path` itself.

    Raises:
        ValueError: a file is absent or damaged; one line with the file and the reason.
    """
    path = Path(path)
    if path.is_file():
        return _open_pickle(path) if path.suffix in PICKLES else _open_file(path)
    if (path / SINGLE).is_file():
        return _open_file(path / SINGLE)
    if (path / INDEX).is_file():
        return _open_index(path / INDEX)
    pickles = sorted(file.name for file in path.glob("*.bin"))
    remedy = f"; {pickles[0]} is a pickle, which is read only by its own path" if pickles else ""
    raise ValueError(f"{path}: neither {SINGLE} nor {INDEX} found{remedy}")


def has_shards(path: str | Path) -> bool:
    """Return True if there are safetensors for `open_shards`, good or not; pickles do not count."""
    path = Path(path)
    return path.suffix == ".safetensors" or any((path / name).is_file() for name in (SINGLE, INDEX))


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write one safetensors file; OSError if that fails.

    Args:
        metadata: at most one entry, so that equal weights are equal files: the order of several is random.
    """
    try:
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path, metadata)
    except SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}") from None


def write_shards(
    folder: Path,
    sizes: Mapping[str, int],
    read: Callable[[str], Tensor],
    texts: Mapping[str, str] = {},
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write tensors into a folder, as `open_shards` and transformers read them.

    One shard at a time is in memory. Everything is written aside first and renamed at the end: an error
    leaves the old files. A process killed while renaming leaves a folder without its index or texts, never a
    mixture of old and new.

    Args:
        sizes: name -> bytes of each tensor.
        read: returns the tensor of a name.
        texts: name -> content of small files that belong to the tensors, such as config.json.
    """
    shards = split_shards(sizes, max_shard_bytes)
    if len(shards) > 1:
        where = {name: file for file, names in shards.items() for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(where.items()))}
        texts = {INDEX: json.dumps(index, indent=2) + "\n", **texts}
    with aside(folder / SINGLE) as partial:
        partial.mkdir()
        for file, names in shards.items():
            write_tensors(partial / file, {name: read(name) for name in names}, _FORMAT)
        for file, text in texts.items():
            (partial / file).write_text(text, "utf-8")
        flush(partial)
        old = [file for file in folder.iterdir() if _OURS.fullmatch(file.name)]
        for file in texts:
            (folder / file).unlink(missing_ok=True)
        for file in shards:
            publish(partial / file, folder / file)
        for file in old:
            if file.name not in (*shards, *texts):
                file.unlink()
        for file in texts:
            publish(partial / file, folder / file)


def split_shards(sizes: Mapping[str, int], max_shard_bytes: int) -> dict[str, list[str]]:
    """Distribute tensors over files, in order: file -> names.

    A file holds at most max_shard_bytes of tensors, or one tensor that is larger.
    """
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes must be 1 or more, got {max_shard_bytes}")
    groups: list[list[str]] = [[]]
    room = max_shard_bytes
    for name, size in sizes.items():
        if size > room and groups[-1]:
            groups.append([])
            room = max_shard_bytes
        groups[-1].append(name)
        room -= size
    count = len(groups)
    if count == 1:
        return {SINGLE: groups[0]}
    return {f"model-{i:05d}-of-{count:05d}.safetensors": names for i, names in enumerate(groups, 1)}


def _open_file(path: Path) -> Shards:
    """Open one safetensors file. Each read opens it anew, so that its pages are freed with the tensor."""
    try:
        with safe_open(path, framework="pt") as file:
            kinds = {n: (file.get_slice(n).get_dtype(), file.get_slice(n).get_shape()) for n in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise _refused(path, error) from None
    offsets = _offsets(path)
    specs = {}
    for name in sorted(kinds, key=lambda name: offsets[name]):
        dtype, shape = kinds[name]
        if dtype not in _DTYPES:
            raise ValueError(f"{path}: {short(name)} must have a dtype of {', '.join(_DTYPES)}, got {dtype}")
        if any(size >= 2**63 for size in shape):
            raise ValueError(f"{path}: {short(name)} has the shape {tuple(shape)}, beyond 64 bits")
        specs[name] = Spec(path, _DTYPES[dtype], tuple(shape))

    def read(name: str) -> Tensor:
        try:
            with safe_open(path, framework="pt") as file:
                return file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise _refused(path, error) from None

    return Shards(specs, read, metadata)


def _offsets(path: Path) -> dict[str, list[int]]:
    """Return the offsets of each tensor from a header that the library has read.

    ValueError for a name that occurs twice: the library would take the last.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = parse_json(file.read(length), path)
    return {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}


def _open_index(path: Path) -> Shards:
    where = read_json(path).get("weight_map")
    if not isinstance(where, dict) or not where or not all(isinstance(file, str) for file in where.values()):
        raise ValueError(f"{path}: weight_map must be an object from tensor names to file names")
    shards = {file: _open_file(_inside(path, file)) for file in dict.fromkeys(where.values())}
    specs: dict[str, Spec] = {}
    for file, shard in shards.items():
        for name, spec in shard.specs.items():
            if where.get(name) != file:
                said = f"says {short(where[name])}" if name in where else "does not name it"
                raise ValueError(f"{spec.file}: holds {short(name)}; {path.name} {said}")
            specs[name] = spec
    if absent := [name for name in where if name not in specs]:
        raise ValueError(f"{path}: {short(where[absent[0]])} holds no {short(absent[0])}")
    return Shards(specs, lambda name: shards[where[name]][name])


def _inside(index: Path, name: str) -> Path:
    """Return the path of a file named by an index; ValueError if it is absent or outside the index's folder.

    In the cache of the Hugging Face hub a snapshot links to the blobs of its repository; these are accepted.
    """
    folder = index.parent.resolve()
    roots = [folder]
    if folder.parent.name == "snapshots":
        roots.append(folder.parent.parent / "blobs")
    try:
        file = (index.parent / name).resolve()
        there = file.is_file()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, or an invalid name
        raise ValueError(f"{index}: {short(name)} is not a file name: {one_line(error)}") from None
    climbs = ".." in PurePosixPath(name).parts or name[:1] == "/"
    if climbs or not any(file.is_relative_to(root) for root in roots):
        raise ValueError(f"{index}: {short(name)} must be a file inside the folder")
    if not there:
        raise ValueError(f"{index}: names {short(name)}, which is absent")
    return index.parent / name


def _open_pickle(path: Path) -> Shards:
    try:
        zipped = zipfile.is_zipfile(path)  # files of torch before 1.6 are not, and cannot be memory-mapped
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # noqa: BLE001 - a damaged pickle can raise anything
        raise ValueError(
            f"{path}: not a pickle that holds only tensors, or damaged ({one_line(error)})"
        ) from None
    if not isinstance(state, dict) or not all(map(_is_plain, state, state.values())):
        raise ValueError(f"{path}: must hold a dictionary from names to dense tensors")
    specs = {name: Spec(path, tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()}
    return Shards(specs, state.__getitem__)


def _is_plain(name: object, tensor: object) -> bool:
    if not isinstance(name, str) or type(tensor) is not Tensor:
        return False
    return tensor.layout is torch.strided and tensor.device.type == "cpu"


def _refused(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path}: not a safetensors file, or cut short ({one_line(error)})")
