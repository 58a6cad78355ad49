"""Rows: what was written is read, with its line; what cannot be is named in one line; nothing is lost."""

import csv
import io
import json
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
def test_tables_come_back(
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
def test_json_lines_come_back(
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
def test_lines_with_a_tab_come_back(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]], end: str
) -> None:
    file = tmp_path_factory.mktemp("tab") / "rows.txt"
    file.write_bytes("".join(f"{text}\t{label}{end}" for text, label in rows).encode())
    found = read_labelled(file, format="tab")
    assert list(zip(found.texts, found.labels, strict=True)) == rows
    assert [line for _, line in found.where] == list(range(1, len(rows) + 1))


@given(st.dictionaries(st.sampled_from("abcdef"), st.lists(LINES, min_size=1), min_size=1))
def test_one_file_a_class_comes_back(
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


def test_one_folder_a_class(tmp_path: Path) -> None:
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
def test_the_class_is_what_differs_in_the_names(tmp_path: Path, names: list[str], classes: list[str]) -> None:
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
def test_the_format_is_seen_or_said(tmp_path: Path, name: str, content: str, columns: dict) -> None:
    write(tmp_path, {name: content})
    found = read_labelled(tmp_path / name, **columns)
    assert found.texts == ("good film", "bad")
    assert found.labels == ("pos", "neg")


def test_texts_alone(tmp_path: Path) -> None:
    write(
        tmp_path, {"a.txt": "text, of course\n and more \n", "b.csv": "text\none\n\ntwo\n", "c.txt": "x\ty\n"}
    )
    assert read_labelled(tmp_path / "a.txt", label=None).texts == ("text, of course", " and more ")
    found = read_labelled(tmp_path / "b.csv", label=None)
    assert (found.texts, found.labels) == (("one", "two"), ())
    assert [line for _, line in found.where] == [2, 4]
    assert read_labelled(tmp_path / "c.txt", label=None).texts == ("x",), "the label is not part of the text"
    assert read_labelled(tmp_path / "c.txt", label=None, format="lines").texts == ("x\ty",)


def test_texts_longer_than_the_csv_modules_limit(tmp_path: Path) -> None:
    write(tmp_path, {"a.csv": f"text,label\n{'word ' * 40_000},pos\n"})
    assert len(read_labelled(tmp_path / "a.csv").texts[0]) == 200_000


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "gb18030"])
def test_other_encodings(tmp_path: Path, encoding: str) -> None:
    word = "体育" if encoding == "gb18030" else "café"
    write(tmp_path, {"a.csv": f"text,label\nfirst,a\n{word},b\n".encode(encoding)})
    assert read_labelled(tmp_path / "a.csv", encoding=encoding).texts[1] == word
    with pytest.raises(ValueError, match=r"a\.csv:(1|3): not utf-8: byte 0x.*encoding=latin-1"):
        read_labelled(tmp_path / "a.csv")


HEAD = "text,label\ngood,pos\n"
WRONG = {
    "missing column": (
        "a.csv",
        "sentence,label\nx,y\n",
        "there are 'sentence', 'label'; did you mean 'sentence'?",
    ),
    "its case": (
        "a.csv",
        "id,TEXT,label\n1,x,y\n",
        "a.csv:1: no 'text'; there are 'id', 'TEXT', 'label'; did you mean 'TEXT'?",
    ),
    "no label": (
        "a.csv",
        "text,lable,x\n1,x,y\n",
        "no 'label'; there are 'text', 'lable', 'x'; did you mean 'lable'?",
    ),
    "neither": ("a.csv", "one,two\n1,x\n", "no 'text'; there are 'one', 'two'"),
    "many": ("a.csv", ",".join(f"c{i}" for i in range(12)), "'c9' and 2 more"),
    "column twice": ("a.csv", "text,label,text\n", "a.csv:1: 'text' stands twice in the header"),
    "empty table": ("a.csv", "", "a.csv:1: no 'text'; there are none"),
    "header only": ("a.csv", "text,label\n\n", "a.csv: no texts in it"),
    "too many cells": (
        "a.csv",
        HEAD + "\nbad, very bad,neg\n",
        "a.csv:4: 3 cells where the header has 2; a text that holds ','",
    ),
    "too few cells": ("a.csv", HEAD + "bad\n", "a.csv:3: 1 cells where the header has 2"),
    "never closed": (
        "a.csv",
        HEAD + '"two\nlines",neg\n"never closed,neg\nmore,pos\n',
        "a.csv:5: unexpected end of data; quotes=false",
    ),
    "quote inside": (
        "a.tsv",
        'text\tlabel\n"Up" is good\tpos\n',
        "a.tsv:2: '\\t' expected after '\"'; quotes=false",
    ),
    "empty text": (
        "a.csv",
        HEAD + " ,neg\n",
        "a.csv:3: an empty text; take the row out, or give skip_empty=true",
    ),
    "missing label": ("a.csv", HEAD + "bad, \n", "a.csv:3: the label is missing"),
    "not JSON": (
        "a.jsonl",
        '{"text": "x", "label": "y"}\n{"text": "x" "label"}\n',
        "a.jsonl:2: not JSON (Expecting ',' delimiter, column 14)",
    ),
    "a list": (
        "a.jsonl",
        '[{"text": "x", "label": "y"}]',
        "a.jsonl:1: wants one object a line; got [{'text'",
    ),
    "no key": (
        "a.jsonl",
        '{"texts": "x", "label": "y"}',
        "a.jsonl:1: no 'text'; there are 'texts', 'label'; did you mean 'texts'?",
    ),
    "key twice": (
        "a.jsonl",
        '{"text": "x", "text": "z", "label": "y"}',
        "a.jsonl:1: not JSON (a key stands twice)",
    ),
    "text no string": ("a.jsonl", '{"text": 3, "label": "y"}', "a.jsonl:1: text: wants a string; got 3"),
    "label null": ("a.jsonl", '{"text": "x", "label": null}', "a.jsonl:1: label: wants a label; got None"),
    "label a list": (
        "a.jsonl",
        '{"text": "x", "label": ["y"]}',
        "a.jsonl:1: label: wants a label; got ['y']",
    ),
    "label NaN": ("a.jsonl", '{"text": "x", "label": NaN}', "a.jsonl:1: label: wants a label; got nan"),
    "no header": (
        "a.tsv",
        "good\tpos\n",
        "a.tsv:1: no 'text'; there are 'good', 'pos'; without a header want format=tab",
    ),
    "half a pair": ("a.jsonl", '{"text": "x", "label": "\\ud800"}', "a.jsonl:1: half of a surrogate pair"),
    "deep": ("a.jsonl", '{"text":' * 100_000, "a.jsonl:1: not JSON"),
    "no tab": ("a.txt", "good\tpos\n\nbad neg\n", "a.txt:3: no tab; wants text<TAB>label"),
    "no text": ("a.txt", "good\tpos\n\tneg\n", "a.txt:2: an empty text"),
    "tab, no label": ("a.txt", "good\tpos\nbad\t\n", "a.txt:2: the label is missing"),
    "no labels": ("a.txt", "good\nbad\n", "a.txt:1: no labels to be seen: no header with 'text' and 'label'"),
    "a NUL": ("a.txt", "good\tpos\nba\0d\tneg\n", "a.txt:2: a NUL, which no text holds"),
    "not UTF-8": (
        "a.txt",
        b"good\tpos\ncaf\xe9\tneg\n",
        "a.txt:2: not utf-8: byte 0xe9, invalid continuation byte; give",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_files_are_refused_in_one_line(tmp_path: Path, case: str) -> None:
    name, content, message = WRONG[case]
    write(tmp_path, {name: content})
    with pytest.raises(ValueError, match=r".") as caught:
        read_labelled(tmp_path / name)
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / name))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no such file, nothing in such a folder"),
        ({".hidden": "x"}, "nothing in such a folder"),
        ({"pos.txt": "x\n", "neg/1.txt": "y"}, "pos.txt stands beside folders"),
        ({"train.csv": HEAD, "test.csv": HEAD}, r"test\.csv: a table among files"),
        ({"pos.txt": "x\n", "neg.txt": "\n"}, r"neg\.txt: an empty file"),
        ({"pos.txt": "x\n", "neg.txt": "y\n\nz\n"}, r"neg\.txt:2: an empty text"),
        ({"pos/1.txt": "x\n", "neg/1.txt": " \n"}, r"neg.1\.txt:1: an empty text"),
        ({"pos/1.txt": "x\n", "neg/deep/1.txt": "y"}, "neg: the folder of a class wants files"),
    ],
)
def test_wrong_folders_are_refused(tmp_path: Path, files: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read_labelled(write(tmp_path, files))
    assert len(str(caught.value).splitlines()) == 1


def test_wrong_words_are_refused(tmp_path: Path) -> None:
    write(tmp_path, {"a.csv": HEAD, "b/x": "x", "b/y": "y"})
    with pytest.raises(ValueError, match="format: wants one of csv, tsv, jsonl, tab, lines; got 'xlsx'"):
        read_labelled(tmp_path / "a.csv", format="xlsx")
    with pytest.raises(ValueError, match=r"b: format=csv is for one file"):
        read_labelled(tmp_path / "b", format="csv")
    with pytest.raises(ValueError, match="encoding: unknown encoding: utf8000"):
        read_labelled(tmp_path / "a.csv", encoding="utf8000")
    with pytest.raises(ValueError, match=r"nowhere: no such file"):
        read_labelled(tmp_path / "nowhere")


def test_quotes_can_be_taken_as_they_stand(tmp_path: Path) -> None:
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
