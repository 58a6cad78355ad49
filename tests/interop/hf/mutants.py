"""Damage copies of a Hugging Face folder: flip bytes, change sizes, rewrite JSON.

`mutate` changes one file of a folder but not the bytes of the tensors. `stored` reads a folder's tensors with
`struct` and `json` alone, independent of the code under test.
"""

import json
import random
import struct
from pathlib import Path

import torch
from torch import Tensor

Header = dict[str, dict]
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
ODD = [0, -1, 1, 3, 2**31, 2**62, 2**64, 10**30, 1.5, 1e308, float("nan"), float("inf"), True, None]
ODD += ["", "12", "model", [], [1, 2], {}, {"a": 1}, "\ud800", "a\nb"]


def split(path: Path) -> tuple[Header, bytes]:
    data = path.read_bytes()
    end = 8 + struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8:end]), data[end:]


def join(path: Path, header: object, payload: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + payload)


def stored(folder: Path) -> dict[str, Tensor]:
    found = {}
    for path in folder.glob("*.safetensors"):
        header, payload = split(path)
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                flat = torch.frombuffer(bytearray(payload[begin:end]), dtype=DTYPES[entry["dtype"]])
                found[name] = flat.view(entry["shape"])
    return found


def flip_header(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    end = 8 + struct.unpack("<Q", data[:8])[0]
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        at = rng.choice([rng.randrange(end), rng.randrange(8)])
        data[at] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def alter_length(path: Path, rng: random.Random) -> None:
    data = path.read_bytes()
    old = struct.unpack("<Q", data[:8])[0]
    new = rng.choice([0, 1, old - 1, old + 1, old + 8, 2 * old, len(data), 10**8 + 1, 2**63, 2**64 - 1])
    path.write_bytes(struct.pack("<Q", new) + data[8:])


def truncate(path: Path, rng: random.Random) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: rng.choice([0, 7, 8, rng.randrange(len(data)), len(data) - 1])])


def append(path: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes() + rng.randbytes(rng.choice([1, 4, 8, 1000])))


def swap_offsets(path: Path, rng: random.Random) -> None:
    header, payload = split(path)
    a, b = rng.sample([name for name in header if name != "__metadata__"], 2)
    header[a]["data_offsets"], header[b]["data_offsets"] = (
        header[b]["data_offsets"],
        header[a]["data_offsets"],
    )
    join(path, header, payload)


def rewrite_entry(path: Path, rng: random.Random) -> None:
    """Change the offsets, dtype or shape of one tensor, also to values of a wrong type."""
    header, payload = split(path)
    entry = header[rng.choice([name for name in header if name != "__metadata__"])]
    begin, end = entry["data_offsets"]
    shape = entry["shape"]
    entry |= rng.choice(
        [
            {"data_offsets": [begin + 4, end]},
            {"data_offsets": [begin - 4, end - 4]},
            {"data_offsets": [end, begin]},
            {"data_offsets": [begin, len(payload)]},
            {"data_offsets": [0, end - begin]},
            {"dtype": rng.choice(["F64", "F16", "BF16", "I32", "U32", "F8_E4M3", "F4", "C64", "f32", "Q4"])},
            {"shape": shape[::-1]},
            {"shape": [*shape, 1]},
            {"shape": [2 * size for size in shape]},
            {"shape": [-size for size in shape]},
            {"dtype": "F16", "shape": [2 * shape[0], *shape[1:]]},
            {rng.choice(["dtype", "shape", "data_offsets"]): rng.choice(ODD)},
            {"shape": [rng.choice(ODD)]},
        ]
    )
    join(path, header, payload)


def rewrite_names(path: Path, rng: random.Random) -> None:
    """Remove, add, rename or duplicate a tensor."""
    header, payload = split(path)
    names = [name for name in header if name != "__metadata__"]
    name, other = rng.sample(names, 2)
    kind = rng.choice(["out", "added", "empty", "renamed", "swapped", "metadata", "twice"])
    if kind == "out":
        del header[name]
    elif kind == "added":
        header["nose"] = {"dtype": "F32", "shape": [1], "data_offsets": [len(payload), len(payload) + 4]}
        payload += b"\0" * 4
    elif kind == "empty":
        header["nose\n"] = {"dtype": "F32", "shape": [0], "data_offsets": [len(payload)] * 2}
    elif kind == "renamed":
        header[rng.choice(["", "a\nb", "\ud800", name.upper(), "model." + name])] = header.pop(name)
    elif kind == "swapped":
        header[name], header[other] = header[other], header[name]
    elif kind == "metadata":
        header["__metadata__"] = rng.choice(ODD)
    else:
        text = json.dumps(header)
        header = (text[:-1] + f", {json.dumps(name)}: {json.dumps(header[other])}}}").encode()
    join(path, header, payload)


def flip_text(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice([1, 1, 1, 3])):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def rewrite_text(path: Path, rng: random.Random) -> None:
    """Replace the text by invalid or unexpected JSON."""
    text = path.read_text()
    texts = [b"", b"[]", b"null", b"{", b"\xff\xfe{}", b"[" * 100_000, b'{"a":' * 100_000, b"9" * 10_000]
    texts += [text.encode("utf-16"), b"\xef\xbb\xbf" + text.encode(), text[: len(text) // 2].encode()]
    texts += [(text.rstrip()[:-1] + ', "model_type": "gpt2", "weight_map": {}, "x": 1, "x": 2}').encode()]
    path.write_bytes(rng.choice(texts))


def rewrite_map(path: Path, rng: random.Random) -> None:
    index = json.loads(path.read_text())
    where = index["weight_map"]
    name = rng.choice(list(where))
    files = ["", ".", "..", "/etc/passwd", "../x.safetensors", "a\0b", "\ud800", "x" * 5000, "config.json"]
    kind = rng.choice(["file", "odd", "out", "more", "moved", "all"])
    if kind == "out":
        del where[name]
    elif kind == "more":
        where["nose"] = where[name]
    elif kind == "moved":
        where[name] = rng.choice([file for file in where.values() if file != where[name]])
    elif kind == "all":
        index["weight_map"] = rng.choice([*ODD, {name: where[name]}])
    else:
        where[name] = rng.choice(files if kind == "file" else ODD)
    path.write_text(json.dumps(index))


def rewrite_config(path: Path, rng: random.Random) -> None:
    keys = json.loads(path.read_text())
    key = rng.choice(list(keys))
    if isinstance(keys[key], dict) and rng.random() < 0.7:
        keys[key][rng.choice(list(keys[key]))] = rng.choice(ODD)
    elif rng.random() < 0.2:
        del keys[key]
    elif isinstance(keys[key], int) and rng.random() < 0.4:
        keys[key] += rng.choice([-1, 1, keys[key], 10**9])
    else:
        keys[key] = rng.choice(ODD)
    path.write_text(json.dumps(keys))


WEIGHTS = [
    flip_header,
    flip_header,
    alter_length,
    truncate,
    append,
    swap_offsets,
    rewrite_entry,
    rewrite_entry,
]
WEIGHTS += [rewrite_names]
INDEX = [flip_text, rewrite_text, rewrite_map, rewrite_map]
CONFIG = [flip_text, rewrite_text, rewrite_config, rewrite_config]


def mutate(folder: Path, seed: int) -> str:
    """Change one file of a folder and return how."""
    rng = random.Random(seed)
    index = folder / "model.safetensors.index.json"
    kinds = [(WEIGHTS, rng.choice(sorted(folder.glob("*.safetensors"))))] * 3 + [
        (CONFIG, folder / "config.json")
    ]
    if index.exists():
        kinds.append((INDEX, index))
    mutators, path = rng.choice(kinds)
    mutator = rng.choice(mutators)
    mutator(path, rng)
    return f"{mutator.__name__} {path.name}"
