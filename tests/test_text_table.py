"""Aligned columns of text."""

import doctest

import pytest

from ffn import text_table as page
from ffn.text_table import columns


def test_first_columns_align_left_and_the_others_right() -> None:
    rows = [("a", "bb", "c"), ("dddd", "", "eee")]
    assert columns(rows) == ["a     bb    c", "dddd      eee"]
    assert columns(rows, left=2) == ["a     bb    c", "dddd      eee"]
    assert columns([("a", "b"), ("cc", "dd")], left=2) == ["a   b", "cc  dd"]
    assert columns([("a", "b", ""), ("", "", "")], left=3) == ["a  b", ""]


def test_wide_characters_count_as_two_columns() -> None:
    assert columns([("中文", "1"), ("abc", "22")]) == ["中文   1", "abc   22"]


def test_rows_of_different_lengths_raise() -> None:
    with pytest.raises(ValueError, match="zip"):
        columns([("a", "b"), ("c",)])


def test_docstring_example() -> None:
    assert doctest.testmod(page).failed == 0
