"""The table of tilings: keys, reading and writing, and no fusion for absent cases."""

import re
from pathlib import Path

import pytest

from benchmarks.tiles import CANDIDATES
from ffn.ops.kernels import tilings
from ffn.ops.kernels.tilings import Tiling, choose, key, to_json

FORMS = [(forward, gated) for forward in (True, False) for gated in (True, False)]
SMALL = Tiling(64, 64, 32, 4, 1, 4, 3)
FINE = '{"rows": 64, "cols": 64, "depth": 32, "group": 4, "parts": 1, "warps": 4, "stages": 3}'


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Point TABLE at a path in tmp_path, where no file exists yet."""
    path = tmp_path / "tilings.json"
    monkeypatch.setattr(tilings, "TABLE", path)
    tilings._measured.cache_clear()
    yield path
    tilings._measured.cache_clear()


def test_keys_are_distinct() -> None:
    assert key(True, (9, 0), "bfloat16", True, 96, 384, 8192) == "forward gated sm90 bfloat16 D96 H384 N13"
    assert key(False, (10, 3), "float16", False, 64, 128, 1) == "backward plain sm103 float16 D64 H128 N0"


def test_keys_round_tokens_down_to_a_power_of_two() -> None:
    at = {N: key(True, (9, 0), "bfloat16", True, 768, 3072, N) for N in (0, 1, 4095, 4096, 8191, 8192)}
    assert at[4096] == at[8191] != at[8192]
    assert at[4095] != at[4096]
    assert at[0] == at[1]


@pytest.mark.parametrize("form", FORMS)
def test_candidates_are_valid_tiles(form: tuple[bool, bool]) -> None:
    for t in CANDIDATES[form]:
        for n in (t.rows, t.cols, t.depth, t.parts, t.warps):
            assert n & (n - 1) == 0
        assert min(t) > 0
        assert t.cols // t.parts * 2 >= 16, "TMA copies at least 16 bytes of a row"
        assert max(t.rows, t.cols, t.depth) <= 256, "TMA boxes are at most 256 wide"


@pytest.mark.parametrize(("forward", "gated"), FORMS)
@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 3)])
def test_no_fusion_off_the_table(table, capability, forward: bool, gated: bool) -> None:
    assert choose(forward, capability, "bfloat16", gated, 768, 3072, 8192) is None


def test_choose_reads_the_table(table: Path) -> None:
    fused, apart = (True, (9, 0), "bfloat16", True, 768, 3072), (False, (9, 0), "bfloat16", True, 768, 3072)
    table.write_text(to_json({key(*fused, 4096): SMALL, key(*apart, 4096): None}))
    assert choose(*fused, 5000) == SMALL
    assert choose(*fused, 9000) is None
    assert choose(*apart, 5000) is None


def test_table_round_trip(table: Path) -> None:
    rows = {"b": SMALL, "a": None, "c": CANDIDATES[True, False][0]}
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
def test_damaged_table_raises_naming_the_file(table: Path, text: str) -> None:
    table.write_text(text)
    with pytest.raises(ValueError, match="tilings") as caught:
        choose(True, (9, 0), "bfloat16", True, 768, 3072, 8192)
    assert str(table) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "python -m benchmarks tune" in str(caught.value)


def test_shipped_table_is_valid() -> None:
    tilings._measured.cache_clear()
    form = r"(forward|backward) (gated|plain) sm\d+ (bfloat16|float16) D\d+ H\d+ N\d+"
    assert [name for name in tilings._measured() if not re.fullmatch(form, name)] == []
