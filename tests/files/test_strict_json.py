"""Untrusted JSON becomes a value or an error of one line."""

from pathlib import Path

import pytest

from ffn.files.strict_json import one_line, read_json, short


def test_json_is_read_strictly(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    with pytest.raises(ValueError, match=r"config\.json: .*No such file"):
        read_json(file)
    file.write_text('{"a": [1, {"b": null}]}')
    assert read_json(file) == {"a": [1, {"b": None}]}
    file.write_text('{"a": {"b": 1, "b": 2}}')
    with pytest.raises(ValueError, match=r"config\.json: .*'b' occurs twice"):
        read_json(file)
    for number in ("NaN", "-Infinity", "1e999"):
        file.write_text(f'{{"a": {number}}}')
        with pytest.raises(ValueError, match=f"'{number}'"):
            read_json(file)


@pytest.mark.parametrize("text", ["a\nb", "a\u2028b", "a\x85 \x1cb", "ab" * 1000])
def test_one_line_and_short_return_one_short_line(text: str) -> None:
    for line in (one_line(text), short(text)):
        assert len(line.splitlines()) == 1
        assert len(line) < 250
