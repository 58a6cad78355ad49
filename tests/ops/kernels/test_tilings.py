"""Which tiling serves which case: the table, the defaults, and the cases that stay apart."""

import re
from pathlib import Path

import pytest

from ffn.ops.kernels import tilings
from ffn.ops.kernels.tilings import DEFAULTS, Tiling, choose, key, to_json

FORMS = [(forward, gated) for forward in (True, False) for gated in (True, False)]
SMALL = Tiling(64, 64, 32, 4, 1, 4, 3)
FINE = '{"rows": 64, "cols": 64, "depth": 32, "group": 4, "parts": 1, "warps": 4, "stages": 3}'


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A table of its own for the test, absent until it is written."""
    path = tmp_path / "tilings.json"
    monkeypatch.setattr(tilings, "TABLE", path)
    tilings._measured.cache_clear()
    yield path
    tilings._measured.cache_clear()


def test_keys_tell_cases_apart() -> None:
    assert key(True, (9, 0), "bfloat16", True, 96, 384, 8192) == "forward gated sm90 bfloat16 D96 H384 N13"
    assert key(False, (10, 3), "float16", False, 64, 128, 1) == "backward plain sm103 float16 D64 H128 N0"


def test_keys_count_tokens_by_their_power_of_two() -> None:
    at = {N: key(True, (9, 0), "bfloat16", True, 768, 3072, N) for N in (0, 1, 4095, 4096, 8191, 8192)}
    assert at[4096] == at[8191] != at[8192]
    assert at[4095] != at[4096]
    assert at[0] == at[1]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("major", DEFAULTS)
def test_defaults_are_tiles_that_the_compiler_takes(major: int, form: tuple[bool, bool]) -> None:
    t = DEFAULTS[major][form]
    for n in (t.rows, t.cols, t.depth, t.parts, t.warps):
        assert n & (n - 1) == 0
    assert min(t) > 0
    assert t.cols // t.parts * 2 >= 16, "the copy engine moves 16 bytes of a row or more"
    assert max(t.rows, t.cols, t.depth) <= 256, "and boxes no wider than 256"


@pytest.mark.parametrize(("forward", "gated"), FORMS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("capability", [(9, 0), (10, 0), (10, 3)])
def test_off_the_table_the_defaults_serve(table, capability, dtype: str, forward: bool, gated: bool) -> None:
    tiling = choose(forward, capability, dtype, gated, 768, 3072, 8192)
    assert tiling == DEFAULTS[capability[0]][forward, gated]


@pytest.mark.parametrize(("forward", "gated"), FORMS)
@pytest.mark.parametrize(
    ("capability", "dtype", "N"),
    [
        ((9, 0), "float32", 8192),
        ((9, 0), "float64", 8192),
        ((9, 0), "bfloat16", 1407),
        ((9, 0), "bfloat16", 0),
        ((8, 0), "bfloat16", 8192),
        ((8, 9), "float16", 8192),
        ((12, 0), "bfloat16", 8192),
    ],
)
def test_some_cases_stay_apart(table, capability, dtype: str, N: int, forward: bool, gated: bool) -> None:
    assert choose(forward, capability, dtype, gated, 768, 3072, N) is None


@pytest.mark.parametrize(("forward", "gated"), FORMS)
def test_a_deep_product_is_the_librarys(table, forward: bool, gated: bool) -> None:
    deepest = 1024 if forward and gated else 2048
    assert choose(forward, (9, 0), "bfloat16", gated, deepest, 5632, 8192) is not None
    assert choose(forward, (9, 0), "bfloat16", gated, deepest + 8, 5632, 8192) is None


@pytest.mark.parametrize(("forward", "gated"), FORMS)
def test_two_tiles_a_processor_are_enough(table, forward: bool, gated: bool) -> None:
    assert choose(forward, (9, 0), "bfloat16", gated, 768, 3072, 1408) is not None


def test_the_table_wins_over_the_defaults(table: Path) -> None:
    fused, apart = (True, (9, 0), "bfloat16", True, 768, 3072), (False, (9, 0), "bfloat16", True, 768, 3072)
    old = (True, (8, 0), "bfloat16", True, 768, 3072)
    rows = {key(*fused, 4096): SMALL, key(*apart, 4096): None, key(*old, 4096): SMALL}
    table.write_text(to_json(rows))
    assert choose(*fused, 5000) == SMALL
    assert choose(*fused, 9000) == DEFAULTS[9][True, True]
    assert choose(*apart, 5000) is None
    assert choose(*old, 5000) == SMALL


def test_a_table_reads_back_as_written(table: Path) -> None:
    rows = {"b": SMALL, "a": None, "c": DEFAULTS[9][True, False]}
    table.write_text(to_json(rows))
    assert tilings._measured() == rows
    assert to_json(tilings._measured()) == table.read_text()
    assert list(tilings._measured()) == sorted(rows)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[1]",
        '{"a": 1}',
        '{"a": [1]}',
        '{"a": {"rows": 64}}',
        f'{{"a": {FINE[:-1]}, "colour": 3}}}}',
        f'{{"a": {FINE.replace("3", "3.0")}}}',
        f'{{"a": {FINE.replace("64", "192")}}}',
        f'{{"a": {FINE.replace("1,", "0,")}}}',
        f'{{"a": {FINE}',
    ],
)
def test_a_damaged_table_is_named(table: Path, text: str) -> None:
    table.write_text(text)
    with pytest.raises(ValueError, match="is no table of tilings") as caught:
        choose(True, (9, 0), "bfloat16", True, 768, 3072, 8192)
    assert str(table) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "python -m benchmarks tune" in str(caught.value)


def test_the_shipped_table_reads_and_its_keys_are_keys() -> None:
    tilings._measured.cache_clear()
    form = r"(forward|backward) (gated|plain) sm\d+ (bfloat16|float16) D\d+ H\d+ N\d+"
    assert [name for name in tilings._measured() if not re.fullmatch(form, name)] == []
