"""Tables, JSON lines, tab-separated lines and folders are read with file and line; errors name both."""

import csv
import io
import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ffn.classify.labelled import read_labelled
from tests.conftest import shared_data

LABELS = st.text(st.characters(categories=["L", "N", "P"]), min_size=1, max_size=8)
TEXTS = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0\ufeff"), min_size=1, max_size=30
)
SHOWN = TEXTS.filter(str.strip)
LINES = SHOWN.filter(lambda words: "\n" not in words and "\r" not in words)


def count_lines(words: str) -> int:
    return words.replace("\r\n", "\n").replace("\r", "\n").count("\n") + 1


@given(st.lists(st.tuples(SHOWN, LABELS), min_size=1, max_size=8), st.sampled_from([",", ";", "\t"]))
def test_a_written_table_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]], delimiter: str
) -> None:
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, delimiter=delimiter, lineterminator="\r\n", quoting=csv.QUOTE_ALL)
    writer.writerows(
        [("label", "id", "text"), *((label, number, text) for number, (text, label) in enumerate(rows))]
    )
    file = tmp_path_factory.mktemp("table") / ("t.tsv" if delimiter == "\t" else "t.csv")
    file.write_bytes(buffer.getvalue().encode())
    found = read_labelled(file)
    assert list(zip(found.texts, found.labels, strict=True)) == rows
    line, lines = 2, []
    for text, _ in rows:
        lines.append((file, line))
        line += count_lines(text)
    assert list(found.where) == lines
    assert read_labelled(file, label=None).texts == found.texts


@given(
    st.lists(st.tuples(SHOWN, LABELS | st.integers() | st.booleans()), min_size=1, max_size=8), st.booleans()
)
def test_written_json_lines_are_read_back(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str | int]], ascii_only: bool
) -> None:
    objects = [{"text": text, "label": label, "more": [1, {}]} for text, label in rows]
    file = tmp_path_factory.mktemp("lines") / "rows.jsonl"
    words = "\n\n".join(json.dumps(row, ensure_ascii=ascii_only) for row in objects)
    file.write_bytes(words.encode())
    found = read_labelled(file)
    assert found.texts == tuple(text for text, _ in rows)
    assert found.labels == tuple(label if isinstance(label, str) else json.dumps(label) for _, label in rows)
    assert [line for _, line in found.where] == list(range(1, 2 * len(rows), 2))


@given(st.lists(st.tuples(LINES, LABELS), min_size=1, max_size=8), st.sampled_from(["\n", "\r\n", "\r"]))
def test_written_tab_lines_are_read_back(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]], end: str
) -> None:
    file = tmp_path_factory.mktemp("tab") / "rows.txt"
    file.write_bytes("".join(f"{text}\t{label}{end}" for text, label in rows).encode())
    found = read_labelled(file, format="tab")
    assert list(zip(found.texts, found.labels, strict=True)) == rows
    assert [line for _, line in found.where] == list(range(1, len(rows) + 1))


@given(st.dictionaries(st.sampled_from("abcdef"), st.lists(LINES, min_size=1), min_size=1))
def test_one_file_per_class_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, classes: dict[str, list[str]]
) -> None:
    folder = tmp_path_factory.mktemp("classes")
    (folder / ".DS_Store").write_bytes(b"\0\xff")
    for name, texts in classes.items():
        (folder / f"{name}.txt").write_bytes("\n".join(texts).encode("utf-8-sig"))
    found = read_labelled(folder)
    expected = [(text, name) for name in sorted(classes) for text in classes[name]]
    assert list(zip(found.texts, found.labels, strict=True)) == expected
    assert found.where[0] == (folder / f"{min(classes)}.txt", 1)


def write(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def test_one_folder_per_class(tmp_path: Path) -> None:
    write(tmp_path, {"pos/0_9.txt": "good\r\nfilm\n", "pos/1_8.txt": "fine", "neg/0_1.txt": "bad\n"})
    found = read_labelled(tmp_path)
    assert found.texts == ("bad", "good\nfilm", "fine")
    assert found.labels == ("neg", "pos", "pos")
    assert found.where[1] == (tmp_path / "pos" / "0_9.txt", 1)
    assert read_labelled(tmp_path, label=None).labels == ()


@pytest.mark.parametrize(
    ("names", "classes"),
    [
        (["pos.txt", "neg.txt"], ["neg", "pos"]),
        (["rt.pos", "rt.neg"], ["neg", "pos"]),
        (["a.txt", "a.md", "b.txt"], ["a.md", "a.txt", "b.txt"]),
        (["a", "a.txt"], ["a", "a.txt"]),
        (["good.v2.txt", "bad.v2.txt"], ["bad.v2", "good.v2"]),
    ],
)
def test_the_class_is_the_differing_part_of_the_file_names(
    tmp_path: Path, names: list[str], classes: list[str]
) -> None:
    write(tmp_path, dict.fromkeys(names, "a text\n"))
    assert sorted(read_labelled(tmp_path).labels) == classes
    assert sorted(read_labelled(f"{tmp_path}/*").labels) == classes


@pytest.mark.parametrize(
    ("name", "content", "columns"),
    [
        ("a.txt", "good film\tpos\nbad\tneg\n", {}),
        ("a.txt", "text\tlabel\ngood film\tpos\nbad\tneg\n", {}),
        ("a.txt", "\ufeff\n\ntext,label\ngood film,pos\nbad,neg", {}),
        ("a", '"label";"text"\npos;good film\nneg;bad\n', {}),
        ("a.tsv", "\tlabel\ttext\n0\tpos\tgood film\n1\tneg\tbad", {}),
        ("a.CSV", "Review,Stars\ngood film, pos\nbad,neg ", {"text": "Review", "label": "Stars"}),
        ("a.json", ' {"text": "good film", "label": "pos"}\n{"label": "neg", "text": "bad"}\n'.lstrip(), {}),
        (
            "a.ndjson",
            '\n{"t": "good film", "l": "pos"}\n{"t": "bad", "l": "neg"}',
            {"text": "t", "label": "l"},
        ),
        ("a.csv", "good film\tpos\nbad\tneg\n", {"format": "tab"}),
        ("a.csv", "text,label,a;b\ngood film,pos,1\nbad,neg,2", {}),
        ("a.txt", "text;label\r\ngood film;pos\r\n\r\nbad;neg", {"format": "csv"}),
    ],
)
def test_the_format_is_guessed_or_given(tmp_path: Path, name: str, content: str, columns: dict) -> None:
    write(tmp_path, {name: content})
    found = read_labelled(tmp_path / name, **columns)
    assert found.texts == ("good film", "bad")
    assert found.labels == ("pos", "neg")


def test_texts_without_labels(tmp_path: Path) -> None:
    write(
        tmp_path, {"a.txt": "text, of course\n and more \n", "b.csv": "text\none\n\ntwo\n", "c.txt": "x\ty\n"}
    )
    assert read_labelled(tmp_path / "a.txt", label=None).texts == ("text, of course", " and more ")
    found = read_labelled(tmp_path / "b.csv", label=None)
    assert (found.texts, found.labels) == (("one", "two"), ())
    assert [line for _, line in found.where] == [2, 4]
    assert read_labelled(tmp_path / "c.txt", label=None).texts == ("x",), "the label is not part of the text"
    assert read_labelled(tmp_path / "c.txt", label=None, format="lines").texts == ("x\ty",)


def test_texts_longer_than_the_field_limit_of_csv(tmp_path: Path) -> None:
    write(tmp_path, {"a.csv": f"text,label\n{'word ' * 40_000},pos\n"})
    assert len(read_labelled(tmp_path / "a.csv").texts[0]) == 200_000


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "gb18030"])
def test_other_encodings(tmp_path: Path, encoding: str) -> None:
    word = "体育" if encoding == "gb18030" else "café"
    write(tmp_path, {"a.csv": f"text,label\nfirst,a\n{word},b\n".encode(encoding)})
    assert read_labelled(tmp_path / "a.csv", encoding=encoding).texts[1] == word
    with pytest.raises(ValueError, match=r"a\.csv:(1|3): .*encoding=latin-1"):
        read_labelled(tmp_path / "a.csv")


HEAD = "text,label\ngood,pos\n"
OBJECT = '{"text": "x", "label": "y"}\n'
WRONG = {  # file, content, line, what the message names
    "missing column": ("a.csv", "sentence,label\nx,y\n", 1, "did you mean 'sentence'?"),
    "its case": ("a.csv", "id,TEXT,label\n1,x,y\n", 1, "did you mean 'TEXT'?"),
    "no label": ("a.csv", "text,lable,x\n1,x,y\n", 1, "did you mean 'lable'?"),
    "neither": ("a.csv", "one,two\n1,x\n", 1, "no column 'text'"),
    "many": ("a.csv", ",".join(f"c{i}" for i in range(12)), 1, "'c9' and 2 more"),
    "column twice": ("a.csv", "text,label,text\n", 1, "'text'"),
    "empty table": ("a.csv", "", 1, "no column 'text'"),
    "header only": ("a.csv", "text,label\n\n", 0, "no texts"),
    "too many cells": ("a.csv", HEAD + "\nbad, very bad,neg\n", 4, "3 cells"),
    "too few cells": ("a.csv", HEAD + "bad\n", 3, "1 cells"),
    "never closed": ("a.csv", HEAD + '"two\nlines",neg\n"never closed,neg\nmore,pos\n', 5, "quotes=false"),
    "quote inside": ("a.tsv", 'text\tlabel\n"Up" is good\tpos\n', 2, "quotes=false"),
    "empty text": ("a.csv", HEAD + " ,neg\n", 3, "skip_empty=true"),
    "missing label": ("a.csv", HEAD + "bad, \n", 3, "label"),
    "not JSON": ("a.jsonl", OBJECT + '{"text": "x" "label"}\n', 2, "column 14"),
    "a list": ("a.jsonl", '[{"text": "x", "label": "y"}]', 1, "[{'text'"),
    "no key": ("a.jsonl", '{"texts": "x", "label": "y"}', 1, "did you mean 'texts'?"),
    "key twice": ("a.jsonl", '{"text": "x", "text": "z", "label": "y"}', 1, "twice"),
    "text no string": ("a.jsonl", '{"text": 3, "label": "y"}', 1, "text must be"),
    "label null": ("a.jsonl", '{"text": "x", "label": null}', 1, "label must be"),
    "label a list": ("a.jsonl", '{"text": "x", "label": ["y"]}', 1, "label must be"),
    "label NaN": ("a.jsonl", '{"text": "x", "label": NaN}', 1, "label must be"),
    "no header": ("a.tsv", "good\tpos\n", 1, "format=tab"),
    "half a pair": ("a.jsonl", '{"text": "x", "label": "\\ud800"}', 1, "surrogate"),
    "deep": ("a.jsonl", '{"text":' * 100_000, 1, "not JSON"),
    "no tab": ("a.txt", "good\tpos\n\nbad neg\n", 3, "no tab"),
    "no text": ("a.txt", "good\tpos\n\tneg\n", 2, "empty text"),
    "tab, no label": ("a.txt", "good\tpos\nbad\t\n", 2, "label"),
    "no labels": ("a.txt", "good\nbad\n", 1, "'text' and 'label'"),
    "a NUL": ("a.txt", "good\tpos\nba\0d\tneg\n", 2, "NUL"),
    "not UTF-8": ("a.txt", b"good\tpos\ncaf\xe9\tneg\n", 2, "byte 0xe9"),
}


@pytest.mark.parametrize("case", WRONG)
def test_an_error_names_the_file_the_line_and_the_fault(tmp_path: Path, case: str) -> None:
    name, content, line, named = WRONG[case]
    write(tmp_path, {name: content})
    with pytest.raises(ValueError, match=re.escape(named)) as caught:
        read_labelled(tmp_path / name)
    place = f"{tmp_path / name}:{line}:" if line else f"{tmp_path / name}:"
    assert str(caught.value).startswith(place)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("files", "named"),
    [
        ({}, "no such file"),
        ({".hidden": "x"}, "no such file"),
        ({"pos.txt": "x\n", "neg/1.txt": "y"}, r"pos\.txt"),
        ({"train.csv": HEAD, "test.csv": HEAD}, r"test\.csv"),
        ({"pos.txt": "x\n", "neg.txt": "\n"}, r"neg\.txt"),
        ({"pos.txt": "x\n", "neg.txt": "y\n\nz\n"}, r"neg\.txt:2:"),
        ({"pos/1.txt": "x\n", "neg/1.txt": " \n"}, r"neg.1\.txt:1:"),
        ({"pos/1.txt": "x\n", "neg/deep/1.txt": "y"}, "neg:"),
    ],
)
def test_an_error_names_the_file_in_a_folder(tmp_path: Path, files: dict[str, str], named: str) -> None:
    with pytest.raises(ValueError, match=named) as caught:
        read_labelled(write(tmp_path, files))
    assert str(caught.value).startswith(str(tmp_path))
    assert len(str(caught.value).splitlines()) == 1


def test_wrong_arguments_are_named(tmp_path: Path) -> None:
    write(tmp_path, {"a.csv": HEAD, "b/x": "x", "b/y": "y"})
    with pytest.raises(ValueError, match=r"^format must be .*'xlsx'"):
        read_labelled(tmp_path / "a.csv", format="xlsx")
    with pytest.raises(ValueError, match=r"^format=csv"):
        read_labelled(tmp_path / "b", format="csv")
    with pytest.raises(ValueError, match=r"^encoding: .*utf8000"):
        read_labelled(tmp_path / "a.csv", encoding="utf8000")
    with pytest.raises(ValueError, match="nowhere: "):
        read_labelled(tmp_path / "nowhere")


def test_quotes_false_reads_quotes_as_text(tmp_path: Path) -> None:
    write(tmp_path, {"a.tsv": 'text\tlabel\n"Up" is good\tpos\n"\tneg\n'})
    assert read_labelled(tmp_path / "a.tsv", quotes=False).texts == ('"Up" is good', '"')


def test_real_files() -> None:
    folder = shared_data("rt-polarity.pos").parent
    reviews = read_labelled(folder / "rt-polarity.*")
    assert (reviews.labels.count("pos"), reviews.labels.count("neg")) == (5331, 5331)
    assert reviews.where[0] == (folder / "rt-polarity.neg", 1)
    titles = read_labelled(shared_data("thucnews-dev.txt"))
    assert titles.texts[0] == "体验2D巅峰 倚天屠龙记十大创新概览"
    assert {name: titles.labels.count(name) for name in titles.labels} == {str(n): 1000 for n in range(10)}
