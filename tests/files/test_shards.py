"""Shards: what was written is read back; a damaged or lying file, or a pickle, is refused in one line."""

import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from ffn.files.shards import INDEX, SINGLE, open_shards, split_shards, write_shards, write_tensors
from tests.files.stored import TENSORS, assert_same, write


def raw(path: Path, header: object, payload: bytes = b"", length: int | None = None) -> Path:
    """A file with any header at all."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + payload)
    return path


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("max_shard_bytes", [10**9, 40, 1])
def test_written_tensors_are_read_back(max_shard_bytes: int, tmp_path: Path) -> None:
    write(tmp_path / "m", max_shard_bytes=max_shard_bytes)
    assert_same(open_shards(tmp_path / "m"))
    first = files(tmp_path / "m")
    assert not [name for name in first if name.startswith(".")]
    write(tmp_path / "n", max_shard_bytes=max_shard_bytes)
    assert files(tmp_path / "n") == first, "equal weights are equal files"
    merged = {}
    for path in (tmp_path / "m").glob("*.safetensors"):
        merged |= load_file(path)
        assert open_shards(path).metadata == {"format": "pt"}
        assert (
            sum(t.nbytes for t in open_shards(path).values()) <= max_shard_bytes or len(load_file(path)) == 1
        )
    assert all(torch.equal(merged[name], tensor) for name, tensor in TENSORS.items())
    if INDEX in first:
        index = json.loads(first[INDEX])
        assert index["metadata"] == {"total_size": sum(t.nbytes for t in TENSORS.values())}
        assert set(index["weight_map"]) == set(TENSORS)


def test_tensors_keep_the_order_of_the_file(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / SINGLE)
    text = (tmp_path / SINGLE).read_bytes()
    header = json.loads(text[8 : 8 + struct.unpack("<Q", text[:8])[0]])
    begins = [header[name]["data_offsets"] for name in open_shards(tmp_path)]
    assert begins == sorted(begins)


@given(sizes=st.lists(st.integers(0, 9), min_size=1, max_size=12), limit=st.integers(1, 20))
def test_shards_keep_order_and_limit(sizes: list[int], limit: int) -> None:
    named = {f"t{i}": size for i, size in enumerate(sizes)}
    shards = split_shards(named, limit)
    assert [name for names in shards.values() for name in names] == list(named)
    assert all(len(names) == 1 or sum(named[n] for n in names) <= limit for names in shards.values())
    assert list(shards) == sorted(shards)
    assert (len(shards) == 1) == (SINGLE in shards)


@pytest.mark.parametrize("before", [10**9, 40, 1])
@pytest.mark.parametrize("after", [10**9, 40, 1])
def test_writing_again_leaves_no_file_of_the_first_time(before: int, after: int, tmp_path: Path) -> None:
    other = {name: tensor.clone() for name, tensor in TENSORS.items()}
    other["a.weight"] += 1
    write(tmp_path / "m", max_shard_bytes=before)
    (tmp_path / "m" / "notes.txt").write_text("stay")
    left = tmp_path / "m" / ".model.safetensors.partial"  # by a killed process
    left.mkdir()
    (left / "model-00001-of-00099.safetensors").write_text("half")
    write(tmp_path / "m", other, after)
    write(tmp_path / "n", other, after)
    assert files(tmp_path / "m") == files(tmp_path / "n") | {"notes.txt": b"stay"}
    assert_same(open_shards(tmp_path / "m"), other)


def test_an_error_while_writing_leaves_the_old_files(tmp_path: Path) -> None:
    write(tmp_path / "m", max_shard_bytes=40)
    before = files(tmp_path / "m")

    def read(name: str) -> Tensor:
        if name == "f":
            raise OSError("no space")
        return TENSORS[name] + 1

    with pytest.raises(OSError, match="no space"):
        write_shards(
            tmp_path / "m", {name: t.nbytes for name, t in TENSORS.items()}, read, max_shard_bytes=40
        )
    assert files(tmp_path / "m") == before
    with pytest.raises(ValueError, match=r"^max_shard_bytes .* 0$"):
        write(tmp_path / "m", max_shard_bytes=0)


A = entry("F32", [2], 0, 8)
LIES = {
    "empty file": (b"", None, "not a safetensors file"),
    "short payload": ({"a": A}, b"\0" * 7, "not a safetensors file"),
    "more payload": ({"a": A}, b"\0" * 9, "not a safetensors file"),
    "no JSON": (b"{oops", b"", "not a safetensors file"),
    "no UTF-8": (b"\xff{}", b"", "not a safetensors file"),
    "deep": (b'{"a":' * 200_000, b"", "not a safetensors file"),
    "list": ([], b"", "not a safetensors file"),
    "NaN": (b'{"a": NaN}', b"", "not a safetensors file"),
    "size": ({"a": entry("F32", [3], 0, 8)}, b"\0" * 8, "not a safetensors file"),
    "dtype lie": ({"a": entry("F64", [2], 0, 8)}, b"\0" * 8, "not a safetensors file"),
    "overlap": ({"a": A, "b": entry("F32", [2], 4, 12)}, b"\0" * 12, "not a safetensors file"),
    "same place": ({"a": A, "b": A}, b"\0" * 8, "not a safetensors file"),
    "hole": ({"a": A, "b": entry("F32", [1], 12, 16)}, b"\0" * 16, "not a safetensors file"),
    "reversed": ({"a": entry("F32", [2], 8, 0)}, b"\0" * 8, "not a safetensors file"),
    "negative": ({"a": entry("F32", [-2], 0, 8)}, b"\0" * 8, "not a safetensors file"),
    "overflow": ({"a": entry("F32", [2**62, 4], 0, 0)}, b"", "not a safetensors file"),
    "beyond 64 bits": ({"a": entry("F32", [2**63, 0], 0, 0)}, b"", "the shape"),
    "unknown dtype": ({"a": entry("Q4", [8], 0, 8)}, b"\0" * 8, "not a safetensors file"),
    "float8": ({"a": entry("F8_E4M3", [8], 0, 8)}, b"\0" * 8, "'a' must have a dtype of .*F8_E4M3"),
    "complex": ({"a": entry("C64", [1], 0, 8)}, b"\0" * 8, "'a' must have a dtype of .*C64|cut short"),
    "a name in two lines": ({"a\nb\u2028c": entry("F32", [3], 0, 8)}, b"\0" * 8, "not a safetensors file"),
    "name twice": (b'{"a":{},"a":{}}'.replace(b"{}", json.dumps(A).encode()), b"\0" * 8, "'a' occurs twice"),
}  # fmt: skip


@pytest.mark.parametrize("what", LIES)
def test_a_lying_header_is_refused_in_one_line(what: str, tmp_path: Path) -> None:
    header, payload, message = LIES[what]
    file = tmp_path / SINGLE
    if payload is None:
        file.write_bytes(header)
    else:
        raw(file, header, payload)
    for path in (tmp_path, file):
        with pytest.raises(ValueError, match=message) as caught:
            open_shards(path)
        assert str(caught.value).startswith(f"{file}: ")
        assert len(str(caught.value).splitlines()) == 1
        assert len(str(caught.value)) < 500


@pytest.mark.parametrize("length", [0, 1, 7, 10**8 + 1, 2**63, 2**64 - 1])
def test_a_lying_length_is_refused(length: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.safetensors: not a safetensors file"):
        open_shards(raw(tmp_path / SINGLE, {"a": A}, b"\0" * 8, length))


def test_a_file_that_changes_after_opening_is_refused(tmp_path: Path) -> None:
    shards = open_shards(raw(tmp_path / SINGLE, {"a": A}, b"\0" * 8))
    raw(tmp_path / "other", {"a": entry("I32", [2], 0, 8)}, b"\0" * 8).replace(tmp_path / SINGLE)
    with pytest.raises(ValueError, match=r"model\.safetensors: 'a' changed while it was read"):
        shards["a"]
    (tmp_path / SINGLE).unlink()
    with pytest.raises(ValueError, match="not a safetensors file"):
        shards["a"]


def test_a_folder_without_safetensors_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ValueError, match=rf"^{folder}: neither model\.safetensors nor"):
            open_shards(folder)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is a pickle"):
        open_shards(tmp_path)


def test_a_pickle_is_read_only_by_its_own_path(tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in TENSORS.items() if name != "c"}
    for path, zipped in ((tmp_path / "new.bin", True), (tmp_path / "old.bin", False)):
        torch.save(tensors, path, _use_new_zipfile_serialization=zipped)
        assert_same(open_shards(path), tensors)
    with pytest.raises(ValueError, match="neither model"):
        open_shards(tmp_path)


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.write_text, (self.path, "done")


def test_a_pickle_of_other_objects_is_refused(tmp_path: Path) -> None:
    file, mark = tmp_path / "pytorch_model.bin", tmp_path / "mark"
    for content in (Evil(mark), [TENSORS["f"]], {"a": 1}, {1: TENSORS["f"]}, {"a": TENSORS["f"].to_sparse()}):
        torch.save(content, file)
        with pytest.raises(
            ValueError, match=r"pytorch_model\.bin: (not a pickle|must hold a dict)"
        ) as caught:
            open_shards(file)
        assert len(str(caught.value).splitlines()) == 1
    assert not mark.exists()
    torch.save(TENSORS, file)
    for damaged in (b"", b"junk", file.read_bytes()[:-200]):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"pytorch_model\.bin: not a pickle"):
            open_shards(file)


def test_write_tensors_raises_oserror_for_a_path_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="cannot write"):
        write_tensors(tmp_path / "absent" / "m", {"a": torch.zeros(1)}, {})
