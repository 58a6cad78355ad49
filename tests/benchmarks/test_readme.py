"""The measured tables of the README and of docs/measured.md are those that the committed rows give."""

import pytest

from benchmarks.readme import PAGES, README, of_the_block, rewritten

TABLES = [(page, make) for page, tables in PAGES.items() for make in tables]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_page_has_what_was_measured(page) -> None:
    text = page.read_text("utf-8")
    assert rewritten(page, text) == text, "run `python -m benchmarks readme`"


@pytest.mark.parametrize(("page", "make"), TABLES)
def test_a_number_of_its_own_is_written_over(page, make) -> None:
    text, row = page.read_text("utf-8"), make()[2]
    label, _, numbers = row[2:].partition(" | ")
    changed = f"| {label} | " + numbers.translate(str.maketrans("0123456789", "1234567890"))
    assert rewritten(page, text.replace(row, changed)) == text
    assert rewritten(page, text.replace(row + "\n", "")) == text


def test_a_table_that_is_not_there() -> None:
    text, head = README.read_text("utf-8"), of_the_block()[0]
    for other in (text.replace(head, ""), text + head + "\n"):
        with pytest.raises(
            ValueError, match=r"^README.md wants one table that begins with \| shape, tokens "
        ):
            rewritten(README, other)
