"""The page holds every row, escapes odd values, and neither runs nor fetches anything."""

import json
import math
from html.parser import HTMLParser
from pathlib import Path

import pytest

from benchmarks import page
from tests.benchmarks.fake_rows import decoder_rows, rows_of

NASTY = '<script>alert("&")</script>'


class Parts(HTMLParser):
    """The tags with their attributes, and the text of each table cell."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.cells: list[str] = []
        self.inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside = tag == "td"
        self.cells += [""] * self.inside

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag != "td"

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.cells[-1] += data


def written(rows: list[dict], folder: Path, pictures: list[tuple[Path, str]] | None = None) -> str:
    page.write(rows, pictures or [], folder / "report.html", "title & <b>")
    return (folder / "report.html").read_text("utf-8")


def test_page_has_every_row_with_its_note(tmp_path: Path) -> None:
    rows = [*rows_of(("small",)), *decoder_rows()]
    rows += [{"block": "small", "implementation": "timm", "error": 0.25, "note": "wrong"}]
    text = written(rows, tmp_path)
    parts = Parts(text)
    assert [tag for tag, _ in parts.tags].count("tr") == len(rows) + 2, "two tables, each with a head"
    assert parts.cells.count("wants a GPU") == 9
    assert "title &amp; &lt;b&gt;" in text
    assert "AMD EPYC" in text
    assert {"training step", "small", "2048", "error 0.25; wrong"} <= {*parts.cells}


def test_odd_values_are_escaped(tmp_path: Path) -> None:
    row = {
        "block": NASTY,
        "tokens": 1,
        "implementation": NASTY,
        "ms": 1.0,
        "note": NASTY,
        "cpu": NASTY,
        NASTY: NASTY,
    }
    row |= {"low": math.nan, "high": math.inf, "dropout": None}
    text = written([row, row | {"ms": None}, {}], tmp_path)
    assert "<script" not in text
    assert Parts(text).cells.count(NASTY) == 6
    assert "inf" in Parts(text).cells


def test_page_runs_and_fetches_nothing(tmp_path: Path) -> None:
    picture = tmp_path / "a.png"
    picture.write_bytes(b"\x89PNG")
    parts = Parts(written(rows_of(("small",)), tmp_path, [(picture, f"A {NASTY}.")]))
    policy = next(
        of["content"] for tag, of in parts.tags if of.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert not {tag for tag, _ in parts.tags} & {"script", "link", "iframe", "object", "embed"}
    links = [of.get(key) for _, of in parts.tags for key in ("src", "href", "srcset") if key in of]
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in links)
    targets = {of.get("id") for _, of in parts.tags}
    assert all(link[1:] in targets for link in links if link.startswith("#"))
    assert f"A {NASTY}." in [of.get("alt") for _, of in parts.tags]


def test_page_without_rows(tmp_path: Path) -> None:
    assert "0 rows with a time" in written([], tmp_path)


@pytest.mark.parametrize(("suite", "picture"), [("ffn", "bars-training-float32"), ("decoder", "decoder")])
def test_page_shows_the_rows_of_its_own_suite(suite: str, picture: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    suites = {"ffn": rows_of(("small",))[:10], "decoder": decoder_rows()}
    for name, rows in suites.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(lines + '{"block": "half wri')
    page.present(suite, tmp_path)
    parts = Parts((tmp_path / "report.html").read_text("utf-8"))
    figures = [of["id"] for tag, of in parts.tags if tag == "figure"]
    assert figures[0] == f"{suite}-{picture}"
    assert {path.stem for path in tmp_path.glob("*.png")} == {*figures}
    assert "half wri" not in parts.cells
