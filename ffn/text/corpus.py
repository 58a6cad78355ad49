"""Text to tokens on disk, split into training and validation.

A corpus is a text file, a folder, a glob pattern, or "stdlib": the sources of the Python standard library on
this machine, so that training needs no download. Tokens are memory-mapped files in the run's folder.

Training and validation do not overlap. A single file is cut once: the first 1 - val_fraction of its
characters are for training, the rest for validation. Of many files, whole files are for validation, chosen
by a hash of their content: identical files are on the same side, and adding files moves no other. (A
character vocabulary is taken from both sides.)
"""

from __future__ import annotations

import array
import glob
import hashlib
import json
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ffn.files.atomic import aside, flush, publish, sha256_file
from ffn.files.dataclass_toml import settle
from ffn.text.tokenizer import Tokenizer, load_tokenizer, make_tokenizer

MANIFEST = "data/manifest.json"
PIECE = 1 << 20  # characters encoded at a time, rounded up to whole lines
NOT_STDLIB = {"test", "tests", "idlelib", "turtledemo", "site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class DataConfig:
    """The text and its tokenizer."""

    path: str = "stdlib"  # a text file, a folder, a glob pattern, or "stdlib"
    tokenizer: str = "byte"  # "byte", "char", or the path of a tokenizer.json
    val_fraction: float = 0.1  # of the characters of one file; the expected share of many files

    def __post_init__(self) -> None:
        settle(self)
        if not self.path:
            raise ValueError("path must be a file, a folder, a pattern or stdlib, got ''")
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"val_fraction must be between 0 and 1, got {self.val_fraction}")


@dataclass(frozen=True)
class Corpus:
    """Tokenised text in two parts. `train` and `val` are 1-D tensors over memory-mapped files."""

    tokenizer: Tokenizer
    train: Tensor
    val: Tensor
    val_bytes: int  # length of the validation text in UTF-8
    fingerprint: str  # of tokens and split: equal fingerprints mean equal batches
    notes: tuple[str, ...]  # for the log: how many files, and which were left out


def find_files(path: str) -> list[Path]:
    """Return the files of a corpus in a fixed order; ValueError if there are none."""
    if path == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        found = [file for file in root.rglob("*.py") if not NOT_STDLIB & set(file.relative_to(root).parts)]
    elif (root := Path(path).expanduser()).is_file():
        return [root]
    elif root.is_dir():
        inside = (file for file in root.rglob("*") if file.is_file())
        found = [file for file in inside if not _is_hidden(file.relative_to(root))]
    else:
        matches = glob.glob(str(root), recursive=True)  # noqa: PTH207 - Path.glob takes no absolute pattern
        found = [Path(name) for name in matches if Path(name).is_file()]
    if not found:
        raise ValueError(
            f"data.path must be a file, a folder with files, a matching pattern or stdlib, got {path}"
        )
    return sorted(found, key=Path.as_posix)


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in path.parts)


def read_text(path: Path) -> str:
    """Return a file's text with its line ends unchanged; ValueError if it is not UTF-8 text."""
    content = path.read_bytes()
    try:
        if b"\0" not in content:
            return content.decode("utf-8")
    except UnicodeDecodeError:
        pass
    raise ValueError(f"{path}: not UTF-8 text")


def split_files(digests: Iterable[str], val_fraction: float) -> set[str]:
    """Return the SHA-256 digests of the files for validation: those below `val_fraction` of the hash's range.

    Neither side is empty: the lowest hash is for validation, the highest for training.

    Raises:
        ValueError: fewer than two files differ.
    """
    different = sorted(set(digests))
    if len(different) < 2:
        raise ValueError(
            "the files of the corpus must differ: all are the same, so validation would repeat training"
        )
    val = {digest for digest in different if int(digest[:16], 16) < val_fraction * 2**64}
    return (val | {different[0]}) - {different[-1]}


def prepare(config: DataConfig, run: Path, wanted: str | None = None) -> Corpus:
    """Tokenise a corpus into `run/tokenizer.json` and `run/data/`; manifest.json is written last.

    The files are written aside and renamed when they are complete.

    Args:
        wanted: the fingerprint that the corpus must have; None for any.

    Raises:
        ValueError: there is no text, none of it is UTF-8, or its fingerprint is not `wanted`; `run` is
            unchanged.
    """
    with aside(run / "data") as partial:
        manifest = _build(config, partial)
        if wanted not in (None, _fingerprint(manifest)):
            raise ValueError(
                f"data.path={config.path}: not the text that {run} began with, and the tokens kept there "
                "are absent or damaged; bring that text back, or start anew in another folder: out=..."
            )
        flush(partial)
        (run / "data").mkdir(exist_ok=True)
        for name in (*manifest["sha256"], MANIFEST):
            publish(partial / name, run / name)
    return _open(run, manifest)


def open_corpus(run: Path) -> Corpus | None:
    """Return the corpus that `prepare` wrote to `run`; None if a file of it is absent or damaged."""
    try:
        manifest = json.loads((run / MANIFEST).read_text("utf-8"))
        sound = all(sha256_file(run / name) == digest for name, digest in manifest["sha256"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return _open(run, manifest) if sound else None


def _open(run: Path, manifest: dict[str, Any]) -> Corpus:
    tokenizer = load_tokenizer(run / "tokenizer.json")
    dtype = _dtype(tokenizer)[1]
    train, val = (
        torch.from_file(str(run / "data" / f"{side}.bin"), size=manifest[side]["tokens"], dtype=dtype)
        for side in ("train", "val")
    )
    notes = tuple(manifest["notes"])
    return Corpus(tokenizer, train, val, manifest["val"]["bytes"], _fingerprint(manifest), notes)


def _fingerprint(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps([manifest["train"], manifest["val"]]).encode()).hexdigest()


def _build(config: DataConfig, folder: Path) -> dict[str, Any]:
    texts, notes = _open_texts(config)
    (folder / "data").mkdir(parents=True)
    make_tokenizer(config.tokenizer, (text for _, text in texts())).save(folder / "tokenizer.json")
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    names = {side: f"data/{side}.bin" for side in ("train", "val")}
    counts = {side: {"tokens": 0, "bytes": 0} for side in names}
    with (folder / names["train"]).open("wb") as train, (folder / names["val"]).open("wb") as val:
        files = {"train": train, "val": val}
        for side, text in texts():
            counts[side]["bytes"] += len(text.encode())
            counts[side]["tokens"] += _encode(text, tokenizer, files[side])
    for side in names:
        if counts[side]["tokens"] < 2:
            what = "training" if side == "train" else "validation"
            raise ValueError(f"data.path={config.path}: too little text, none is left for {what}")
    digests = {name: sha256_file(folder / name) for name in ("tokenizer.json", *names.values())}
    manifest = {"config": asdict(config), "notes": notes, "sha256": digests}
    for side, name in names.items():
        manifest[side] = {**counts[side], "sha256": digests[name]}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", "utf-8")
    return manifest


def _open_texts(config: DataConfig) -> tuple[Callable[[], Iterator[tuple[str, str]]], list[str]]:
    """Return a function that iterates over the corpus as (side, text), and notes for the log."""
    files, notes = _without_runs(find_files(config.path), config.path)
    if len(files) == 1:
        text = read_text(files[0])
        if not text:
            raise ValueError(f"data.path={config.path}: an empty file")
        cut = int(len(text) * (1 - config.val_fraction))
        notes.insert(0, f"1 file, {len(text):,} characters")
        return lambda: iter([("train", text[:cut]), ("val", text[cut:])]), notes
    digests, skipped = {}, []
    for file in files:
        try:
            text = read_text(file)
        except ValueError:
            skipped.append(file.name)
        else:
            if text:
                digests[file] = hashlib.sha256(text.encode()).hexdigest()
    if not digests:
        raise ValueError(f"data.path={config.path}: {len(files)} files, none of them UTF-8 text")
    val = split_files(digests.values(), config.val_fraction)
    n_val = sum(digest in val for digest in digests.values())
    notes.insert(0, f"{len(digests) - n_val} files to train on, {n_val} to validate on")
    if skipped:
        notes.append(f"left out {len(skipped)} files that are not UTF-8 text: {', '.join(skipped[:5])}")

    def texts() -> Iterator[tuple[str, str]]:
        for file, digest in digests.items():
            text = read_text(file)
            yield ("val" if digest in val else "train"), text if text.endswith("\n") else text + "\n"

    return texts, notes


def _without_runs(files: list[Path], path: str) -> tuple[list[Path], list[str]]:
    """Leave out files in folders of training runs, with a note for each run; a single file is kept."""
    folders = {folder for file in files for folder in file.parents} if len(files) > 1 else set()
    runs = {f for f in folders if (f / ".lock").is_file() and (f / "config.toml").is_file()}
    kept = [file for file in files if runs.isdisjoint(file.parents)]
    if not kept:
        raise ValueError(f"data.path={path}: all its files belong to training runs")
    return kept, [f"left out what training left in {run}" for run in sorted(runs)]


def _encode(text: str, tokenizer: Tokenizer, file: BinaryIO) -> int:
    """Append the text's tokens to the file, some lines at a time; return their number."""
    typecode = _dtype(tokenizer)[0]
    count, lines, characters = 0, [], 0
    for line in [*text.splitlines(keepends=True), ""]:
        lines.append(line)
        characters += len(line)
        if characters >= PIECE or not line:
            tokens = array.array(typecode, tokenizer.encode("".join(lines)))
            tokens.tofile(file)
            count, lines, characters = count + len(tokens), [], 0
    return count


def _dtype(tokenizer: Tokenizer) -> tuple[str, torch.dtype]:
    """Return the narrowest type that holds every token: its letter for `array`, and torch's dtype."""
    if tokenizer.vocab_size <= 1 << 8:
        return "B", torch.uint8
    if tokenizer.vocab_size <= 1 << 16:
        return "H", torch.uint16
    return "i", torch.int32
