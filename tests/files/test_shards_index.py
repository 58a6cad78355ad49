"""Shards of several files: an index that lies, or a link out of the folder, is refused in one line."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ffn.files.shards import INDEX, open_shards
from tests.files.stored import TENSORS, assert_same, write


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A folder with an index of three files, and a stray file beside it."""
    write(tmp_path / "m", max_shard_bytes=30)
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 2
    save_file({"x": torch.ones(1)}, tmp_path / "stray.safetensors")
    return tmp_path / "m"


def indexed(folder: Path, change: object) -> None:
    """Change the index's weight_map by a function, or replace the index by bytes."""
    file = folder / INDEX
    if isinstance(change, bytes):
        file.write_bytes(change)
        return
    index = json.loads(file.read_text())
    assert callable(change)
    index["weight_map"] = change(index["weight_map"])
    file.write_text(json.dumps(index))


FIRST = "model-00001-of-"
INDEXES = {
    "no JSON": (b"{", "not JSON, or damaged"),
    "no UTF-8": (b'{"weight_map": {"\xff": ""}}', "not JSON, or damaged"),
    "NaN": (b'{"weight_map": NaN}', "'NaN'"),
    "deep": (b"[" * 200_000, "not JSON, or damaged"),
    "digits": (b"1" * 10_000, "not JSON, or damaged"),
    "list": (b"[]", "JSON object"),
    "twice": (b'{"weight_map": {"a": "m", "a": "n"}}', "'a' occurs twice"),
    "no map": (b"{}", "weight_map"),
    "empty map": (lambda m: {}, "weight_map"),
    "numbers": (lambda m: {**m, "b": 1}, "weight_map"),
    "absolute": (lambda m: {**m, "x": "/etc/passwd"}, "'/etc/passwd' must be a file inside"),
    "climbing": (lambda m: {**m, "x": "../stray.safetensors"}, "must be a file inside"),
    "climbing back": (lambda m: {n: f"../m/{f}" for n, f in m.items()}, "must be a file inside"),
    "absent": (lambda m: {**m, "x": "m.safetensors"}, r"names 'm\.safetensors'"),
    "the folder": (lambda m: {**m, "x": "."}, "names '.'"),
    "no name": (lambda m: {**m, "x": ""}, "names ''"),
    "null byte": (lambda m: {**m, "x": "a\0b"}, "is not a file name"),
    "surrogate": (lambda m: {**m, "x": "\ud800"}, "is not a file name"),
    "long": (lambda m: {**m, "x": "a" * 5000}, "is not a file name"),
    "in two lines": (lambda m: {**m, "x": "a\nb"}, r"names 'a\\nb'"),
    "left out": (lambda m: {n: f for n, f in m.items() if n != "b"}, "holds 'b'; .* does not name it"),
    "too many": (lambda m: {**m, "x": m["b"]}, "holds no 'x'"),
    "elsewhere": (lambda m: {**m, "a.weight": m["f"]}, "holds 'a.weight'; .* says 'model-"),
}  # fmt: skip


@pytest.mark.parametrize("what", INDEXES)
def test_a_lying_index_is_refused_in_one_line(what: str, sharded: Path) -> None:
    change, message = INDEXES[what]
    indexed(sharded, change)
    with pytest.raises(ValueError, match=message) as caught:
        open_shards(sharded)
    assert str(caught.value).startswith(f"{sharded}/model")
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 500


def test_a_tensor_in_two_shards_is_refused(sharded: Path) -> None:
    file = json.loads((sharded / INDEX).read_text())["weight_map"]["f"]
    save_file({"f": TENSORS["f"], "b": TENSORS["b"]}, sharded / file)
    with pytest.raises(ValueError, match=r"holds 'b'; model\.safetensors\.index\.json says"):
        open_shards(sharded)


def test_links_out_of_the_folder_are_refused(sharded: Path, tmp_path: Path) -> None:
    (sharded / "out.safetensors").symlink_to(tmp_path / "stray.safetensors")
    indexed(sharded, lambda m: {**m, "x": "out.safetensors"})
    with pytest.raises(ValueError, match=r"'out\.safetensors' must be a file inside"):
        open_shards(sharded)
    (sharded / "loop.safetensors").symlink_to("loop.safetensors")
    indexed(sharded, lambda m: {**m, "x": "loop.safetensors"})
    with pytest.raises(ValueError, match=r"loop\.safetensors' is not a file name|names"):
        open_shards(sharded)


def test_links_of_the_hub_cache_are_accepted(sharded: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "0a", tmp_path / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(sharded.iterdir())):
        (blobs / str(number)).write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(Path("..") / ".." / "blobs" / str(number))
    assert_same(open_shards(snapshot))
