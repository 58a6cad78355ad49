"""Corpora: training and validation do not overlap, and no text is lost."""

import hashlib
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ffn.text import corpus as data
from ffn.text.corpus import DataConfig, find_files, open_corpus, prepare, split_files
from ffn.text.windows import Batches

NAMES = st.lists(st.integers(0, 30), min_size=2, max_size=40)


def digests_of(contents: list[int]) -> list[str]:
    return [hashlib.sha256(str(content).encode()).hexdigest() for content in contents]


def text_of(tokens: torch.Tensor) -> str:
    return bytes(tokens.tolist()).decode()


@given(NAMES.filter(lambda contents: len(set(contents)) > 1), st.floats(0.01, 0.99))
def test_files_are_split_by_content(contents: list[int], fraction: float) -> None:
    digests = digests_of(contents)
    val = split_files(digests, fraction)
    assert val < set(digests)
    assert val
    assert split_files(reversed(digests), fraction) == val, "the order of the files does not matter"
    more = split_files([*digests, *digests_of([99])], fraction)
    assert len((more ^ val) - {digests_of([99])[0]}) <= 1, (
        "a new file moves at most one that filled an empty side"
    )


def test_equal_files_only_cannot_be_split() -> None:
    with pytest.raises(ValueError, match="must differ"):
        split_files(digests_of([1, 1]), 0.5)


@given(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=30),
    st.floats(0.1, 0.9),
)
def test_one_file_is_cut_once(tmp_path_factory: pytest.TempPathFactory, text: str, fraction: float) -> None:
    folder = tmp_path_factory.mktemp("one")
    (folder / "text.txt").write_bytes(text.encode())
    corpus = prepare(DataConfig(str(folder / "text.txt"), val_fraction=fraction), folder)
    cut = int(len(text) * (1 - fraction))
    assert text_of(corpus.train) == text[:cut]
    assert text_of(corpus.val) == text[cut:]
    assert corpus.val_bytes == len(text[cut:].encode())


def test_each_file_is_on_one_side(tmp_path: Path) -> None:
    texts = {f"text {i} ".encode() * 5 for i in range(40)}
    for i, text in enumerate([*texts, *texts]):  # each text twice
        folder = tmp_path / "corpus" / f"d{i % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i}.txt").write_bytes(text)
    (tmp_path / "corpus" / "picture.bin").write_bytes(b"\x00\x01")
    (tmp_path / "corpus" / "latin.txt").write_bytes("é".encode("latin-1"))
    (tmp_path / "corpus" / ".hidden").write_bytes(b"hidden")
    corpus = prepare(DataConfig(str(tmp_path / "corpus"), val_fraction=0.3), tmp_path)
    train, val = (set(text_of(side).encode().splitlines()) for side in (corpus.train, corpus.val))
    assert train | val == texts
    assert not train & val
    assert len(corpus.train) + len(corpus.val) == sum(2 * (len(text) + 1) for text in texts)
    assert corpus.notes[1] == "left out 2 files that are not UTF-8 text: latin.txt, picture.bin"


def test_encoding_in_pieces_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.txt").write_text("zwölf\r\nBoxkämpfer\n\n  jagen\u2028Viktor" * 9)
    config = DataConfig(str(tmp_path / "text.txt"), tokenizer="char")
    whole = prepare(config, tmp_path)
    monkeypatch.setattr(data, "PIECE", 7)
    pieces = prepare(config, tmp_path)
    assert torch.equal(whole.train, pieces.train)
    assert whole.fingerprint == pieces.fingerprint


@pytest.mark.parametrize(("size", "dtype"), [(256, torch.uint8), (257, torch.uint16), (65_537, torch.int32)])
def test_tokens_have_the_narrowest_type(size: int, dtype: torch.dtype, tmp_path: Path) -> None:
    alphabet = "".join(chr(c) for c in range(1, size + 2049) if not 0xD800 <= c < 0xE000)[:size]
    (tmp_path / "text.txt").write_bytes((alphabet * 2).encode())
    corpus = prepare(DataConfig(str(tmp_path / "text.txt"), tokenizer="char", val_fraction=0.5), tmp_path)
    assert corpus.train.dtype == dtype
    assert torch.equal(corpus.train.long(), torch.arange(size))
    tokens, targets = Batches(corpus.train, 4, 2, 0)(0)
    assert torch.equal(tokens[:, 1:], targets[:, :-1])


def files_of(run: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_damaged_tokens_are_not_opened(tmp_path: Path) -> None:
    text, run = tmp_path / "text.txt", tmp_path / "run"
    text.write_text("one " * 50)
    assert open_corpus(run) is None
    first = prepare(DataConfig(str(text)), run)
    text.write_text("two " * 50)
    kept = open_corpus(run)
    assert kept is not None
    assert kept.fingerprint == first.fingerprint
    assert text_of(kept.train) == text_of(first.train) == "one " * 45
    for name in ("tokenizer.json", "data/train.bin", "data/val.bin", "data/manifest.json"):
        whole = (run / name).read_bytes()
        (run / name).write_bytes(b"X" + whole[1:])
        assert open_corpus(run) is None
        (run / name).unlink()
        assert open_corpus(run) is None
        (run / name).write_bytes(whole)
    assert text_of(prepare(DataConfig(str(text)), run).train) == "two " * 45, "a new start reads the file"


def test_prepare_refuses_another_text_than_wanted(tmp_path: Path) -> None:
    text, run = tmp_path / "text.txt", tmp_path / "run"
    text.write_text("one " * 50)
    config = DataConfig(str(text))
    wanted = prepare(config, run).fingerprint
    (run / "data" / "train.bin").unlink()
    text.write_text("two " * 50)
    before = files_of(run)
    with pytest.raises(ValueError, match=r"^data\.path=.*text\.txt: not the text"):
        prepare(config, run, wanted)
    assert files_of(run) == before
    text.write_text("one " * 50)
    assert prepare(config, run, wanted).fingerprint == wanted
    assert not list(run.glob(".*")), "nothing half-written is left"


@pytest.mark.parametrize("pattern", [".", "**/*.*"])
def test_files_of_training_runs_are_left_out(pattern: str, tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt", "project/config.toml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"text {name} " * 9)
    config, run = DataConfig(str(tmp_path / pattern)), tmp_path / "runs" / "mine"
    run.mkdir(parents=True)
    (run / ".lock").touch()
    (run / "config.toml").write_text("")
    first = prepare(config, run)
    (run / "samples.txt").write_text("a sample")
    second = prepare(config, run)
    assert second.fingerprint == first.fingerprint
    assert len(second.train) + len(second.val) == sum(
        len(f"text {n} " * 9) + 1 for n in ("a.txt", "b.txt", "project/config.toml")
    )
    assert second.notes[1] == f"left out what training left in {run}"
    with pytest.raises(ValueError, match=r"^data\.path="):
        prepare(DataConfig(str(tmp_path / "runs")), tmp_path / "other")


def test_the_standard_library_is_a_corpus() -> None:
    files = find_files("stdlib")
    names = {file.name for file in files}
    assert {"argparse.py", "random.py"} <= names
    assert not {part for file in files for part in file.parts} & {"site-packages", "idlelib", "__pycache__"}
    assert files == sorted(files, key=Path.as_posix)


def test_find_files_takes_files_folders_and_patterns(tmp_path: Path) -> None:
    for name in ("a.txt", "b.md", "sub/c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert [f.name for f in find_files(str(tmp_path))] == ["a.txt", "b.md", "c.txt"]
    assert [f.name for f in find_files(str(tmp_path / "**" / "*.txt"))] == ["a.txt", "c.txt"]
    assert find_files(str(tmp_path / "b.md")) == [tmp_path / "b.md"]
    with pytest.raises(ValueError, match=r"^data\.path must be .*\*.rst$"):
        find_files(str(tmp_path / "*.rst"))


def test_unusable_texts_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"text.txt: not UTF-8 text"):
        prepare(DataConfig(str(tmp_path / "text.txt")), tmp_path)
    (tmp_path / "text.txt").write_text("ab")
    with pytest.raises(ValueError, match="too little text"):
        prepare(DataConfig(str(tmp_path / "text.txt")), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"], "nothing half-written is left"
    (tmp_path / "text.txt").write_text("")
    with pytest.raises(ValueError, match=r"^data\.path=.*text\.txt: an empty file$"):
        prepare(DataConfig(str(tmp_path / "text.txt"), tokenizer="char"), tmp_path)
    (tmp_path / "bin").mkdir()
    for name in "ab":
        (tmp_path / "bin" / name).write_bytes(b"\0")
    with pytest.raises(ValueError, match="UTF-8"):
        prepare(DataConfig(str(tmp_path / "bin")), tmp_path)
    with pytest.raises(ValueError, match=r"^val_fraction .* got 1"):
        DataConfig(val_fraction=1)
