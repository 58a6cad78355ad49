"""Pictures: drawn from timed rows only, robust to odd values, and with the right numbers."""

import math
from pathlib import Path

import pytest

from benchmarks import plots
from benchmarks.cases import BLOCKS, Case
from benchmarks.look import LOOKS, Picture, spaced, styles_of
from benchmarks.roofline import intensity, roofline
from benchmarks.rows import timed
from tests.benchmarks.fake_rows import decoder_rows, rows_of

pytest.importorskip("matplotlib")
ROW = {
    "block": "small",
    "tokens": 16,
    "dtype": "float32",
    "work": "training",
    "implementation": "ffn",
    "ms": 1.0,
}


def drawn(rows: list[dict], folder: Path) -> list[str]:
    """Draw the pictures, check that each is one, and return their kinds."""
    pictures = plots.draw(rows, folder, "fake")
    for path, caption in pictures:
        assert path.parent == folder
        content = path.read_bytes()
        assert content.startswith(b"\x89PNG")
        width, height = (int.from_bytes(content[at : at + 4]) for at in (16, 20))
        assert width == 1200
        assert height > 200
        assert caption.endswith(".")
        assert caption.count(". ") == 0, "one sentence"
    assert sorted(path.name for path, _ in pictures) == sorted(path.name for path in folder.iterdir())
    return [path.stem.removeprefix("fake-") for path, _ in pictures]


def test_every_kind_of_picture_is_drawn(tmp_path: Path) -> None:
    kinds = drawn([*rows_of(("small", "gpt2")), *decoder_rows()], tmp_path)
    assert {kind.split("-")[0] for kind in kinds} == {"bars", "roofline", "memory", "cost", "decoder"}


def test_cost_curves_need_three_points(tmp_path: Path) -> None:
    kinds = drawn(rows_of(("small",), (16, 512)), tmp_path)
    assert not [kind for kind in kinds if kind.startswith("cost")]


def test_rows_without_a_time_are_not_drawn(tmp_path: Path) -> None:
    untimed = [{**ROW, "ms": ms, "speedup": 2.0, "tflops": 1.0} for ms in (None, math.nan, 0.0)]
    untimed += [{key: value for key, value in ROW.items() if key != "ms"} | {"saved_per_token": 5}]
    untimed += [{"shape": "gpt2", "implementation": "ffn", "note": "out of memory"}]
    assert drawn(untimed, tmp_path) == []


ODD = [
    {"low": 0.0, "high": math.inf},
    {"low": math.nan, "high": None},
    {"dropout": None},
    {"block": "of no model"},
    {"block": None, "dtype": "a/../b"},
    {"implementation": "$\\frac$ <b>_"},
    {"implementation": ""},
    {"speedup": 1e6},
    {"tflops": math.inf, "saved_per_token": math.nan},
    {"tokens": 10**7},
]


def test_odd_values_do_not_raise(tmp_path: Path) -> None:
    row = {**ROW, "speedup": 1.5, "low": 1.4, "high": 1.6, "tflops": 0.1, "saved_per_token": 100}
    others = [{**row, "implementation": name, "speedup": 1.0} for name in ("torch", "timm")]
    assert len(drawn([*others, *(row | odd for odd in ODD)], tmp_path)) >= 3


def test_roofline_works_with_one_of_its_roofs(tmp_path: Path) -> None:
    row = {**ROW, "tflops": 0.1}
    for number, limits in enumerate(({"gbs": 1.0}, {"tflops": 0.2}, {"gbs": 1e9, "tflops": 1e-9})):
        ceiling = {**ROW, "implementation": "ceiling", **limits}
        assert drawn([row, ceiling], tmp_path / str(number)) == ["roofline-float32"]


def test_the_roof_is_the_fastest_copy_and_the_fastest_matmuls() -> None:
    limits = [{"gbs": 9.0, "tflops": 0.2}, {"gbs": 14.0, "tflops": 0.5}, {"gbs": 11.0, "tflops": 0.3}]
    rows = [{**ROW, "tflops": 0.1}, *({**ROW, "implementation": "ceiling", **limit} for limit in limits)]
    (picture,) = roofline(timed(rows), styles_of(["ffn"]))
    assert {"copy, 14 GB/s", "bare products, 500 GFLOP/s "} <= words(picture)


def test_style_of_an_implementation_does_not_depend_on_the_others() -> None:
    few, many = (
        styles_of(["ffn", "timm"]),
        styles_of([*LOOKS, "someone", "someone else", "ffn other", "ceiling"]),
    )
    assert few.items() <= many.items()
    assert "ceiling" not in many
    assert [name for name, style in many.items() if style.ours] == [
        name for name in many if name.startswith("ffn")
    ]
    looks = [(style.colour, style.marker) for style in many.values()]
    assert len(set(looks)) >= len(looks) - 1, (
        "only transformers' model and its block share a style: they are never in one picture"
    )


def words(picture: Picture) -> set[str]:
    from matplotlib.text import Text

    return {text.get_text() for text in picture.figure.findobj(Text)}


def test_bars_show_the_ratio_of_the_block_itself() -> None:
    rows = [{**ROW, "speedup": 1.5}, {**ROW, "speedup": 4.25, "implementation": "ffn int8"}]
    rows += [{**ROW, "speedup": 3.75, "implementation": "ffn packed", "tokens": 1}]
    (picture,) = plots.bars(timed(rows), styles_of(["ffn", "ffn int8", "ffn packed"]))
    assert {"ffn", "1.50×"} <= words(picture)
    assert not {"4.25×", "3.75×"} & words(picture)


def test_memory_uses_one_number_of_tokens_and_shows_it() -> None:
    def kept(block: str, tokens: int, size: float) -> dict:
        return {**ROW, "block": block, "tokens": tokens, "saved_per_token": size, "dtype": "autocast"}

    rows = [kept("small", 2048, 2e3), kept("small", 512, 5e3), kept("gpt2", 512, 7e3)]
    (shared,) = plots.memory(timed(rows), styles_of(["ffn"]))
    assert {"5 KB", "7 KB"} <= words(shared)
    assert "2 KB" not in words(shared)
    assert any("of 512 tokens:" in text for text in words(shared))
    assert "with the weights' bfloat16 copies" in shared.caption
    (apart,) = plots.memory(timed(rows[::2]), styles_of(["ffn"]))
    assert {"2 KB", "7 KB"} <= words(apart)


def test_int8_rows_are_not_in_the_roofline(tmp_path: Path) -> None:
    row = {**ROW, "tflops": 0.1, "speedup": 2.0}
    eight = [{**row, "implementation": name} for name in ("ffn int8", "torchao float8")]
    assert drawn(eight, tmp_path) == ["bars-training-float32"]


def test_labels_of_tokens_do_not_overlap() -> None:
    counts = [1, 16, 128, 512, 2048, 8192]
    assert spaced(counts, 3.4) == counts
    assert spaced(counts, 2.0) == [1, 16, 128, 512, 8192]
    assert spaced([1, 2, 3], 0.3) == [1, 3]
    assert spaced([16, 512, 2048], 2.0) == [16, 512, 2048]


def test_intensity_equals_the_hand_count() -> None:
    block = BLOCKS["gpt2"]  # two matrices of 768 by 3072
    moved = 4 * (2 * 768 * 3072 + 2 * 16 * 768)
    assert intensity(Case(block, 16, work="inference")) == 2 * 16 * 2 * 768 * 3072 / moved
    assert intensity(Case(block, 16)) == intensity(Case(block, 16, work="inference"))
    assert intensity(Case(block, 16, "bfloat16")) == 2 * intensity(Case(block, 16))
