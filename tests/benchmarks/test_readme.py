"""The README's measured tables are those that the committed rows give."""

import pytest

from benchmarks.readme import README, TABLES, of_the_block, rewritten

TEXT = README.read_text("utf-8")


def test_the_readme_has_what_was_measured() -> None:
    assert rewritten(TEXT) == TEXT, "run `python -m benchmarks readme`"


@pytest.mark.parametrize("make", TABLES)
def test_a_number_of_its_own_is_written_over(make) -> None:
    row = make()[2]
    label, _, numbers = row[2:].partition(" | ")
    changed = f"| {label} | " + numbers.translate(str.maketrans("0123456789", "1234567890"))
    assert rewritten(TEXT.replace(row, changed)) == TEXT
    assert rewritten(TEXT.replace(row + "\n", "")) == TEXT


def test_a_table_that_is_not_there() -> None:
    head = of_the_block()[0]
    for text in (TEXT.replace(head, ""), TEXT + head + "\n"):
        with pytest.raises(
            ValueError, match=r"^README.md wants one table that begins with \| shape, tokens "
        ):
            rewritten(text)
