"""Splits are stratified, seeded and disjoint; labels become class numbers."""

from collections import Counter
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from ffn.classify.labelled import Labelled, encode_labels, overlap, read_labelled, split
from tests.conftest import shared_data

SHARES = st.sampled_from(
    [(0.8, 0.1, 0.1), (0.9, 0.1), (0.5, 0.5), (0.98, 0.01, 0.01), (0.1, 0.1, 0.8), (0.25,) * 4]
)


def labelled(rows: list[tuple[str, str]]) -> Labelled:
    texts, labels = zip(*rows, strict=True) if rows else ((), ())
    return Labelled(texts, labels, tuple((Path("rows.csv"), line) for line in range(2, len(rows) + 2)))


def pairs(rows: Labelled) -> list[tuple]:
    return list(zip(rows.texts, rows.labels, strict=True))


# Few texts, so that many occur twice, also under two labels.
ROWS = st.lists(st.tuples(st.integers(0, 60).map("text {}".format), st.sampled_from("abc")), min_size=30)


@given(ROWS, SHARES, st.integers(0, 5))
def test_splits_are_disjoint_and_complete(
    rows: list[tuple[str, str]], shares: tuple[float, ...], seed: int
) -> None:
    assume(len({text for text, _ in rows}) >= 12)  # enough for every split
    whole = labelled(rows)
    splits = split(whole, shares, seed)
    assert len(splits) == len(shares)
    assert sorted(where for part in splits for where in part.where) == list(whole.where)
    for part in splits:
        assert [rows[line - 2] for _, line in part.where] == pairs(part), "a row stays a row, in its order"
    for i, part in enumerate(splits):
        assert all(overlap(part, other) == 0 for other in splits[:i])


@given(ROWS, st.randoms(use_true_random=False), st.integers(0, 5))
def test_a_split_does_not_depend_on_the_order_of_the_rows(
    rows: list[tuple[str, str]], random: Random, seed: int
) -> None:
    assume(len({text for text, _ in rows}) >= 12)
    shuffled = [*rows, rows[0]]
    random.shuffle(shuffled)
    for part, other in zip(
        split(labelled(rows), seed=seed), split(labelled(shuffled), seed=seed), strict=True
    ):
        assert {*pairs(part)} == {*pairs(other)}


@given(st.integers(1, 60), st.integers(1, 60), SHARES)
def test_each_class_is_divided_by_the_fractions(first: int, second: int, shares: tuple[float, ...]) -> None:
    sizes = {"a": first, "b": second, "c": 20}
    rows = [(f"{name} {number}", name) for name, size in sizes.items() for number in range(size)]
    splits = split(labelled(rows), shares)
    for name, size in sizes.items():
        counts = [part.labels.count(name) for part in splits]
        assert sum(counts) == size
        if size < len(shares):
            assert counts[0] == size
        else:
            assert min(counts) >= 1
            if size * min(shares) >= 1:
                assert all(abs(n - size * share) <= 1 for n, share in zip(counts, shares, strict=True))


def test_seeds_give_different_splits() -> None:
    rows = labelled([(f"text {number}", "ab"[number % 2]) for number in range(100)])
    tests = {seed: split(rows, seed=seed)[2].texts for seed in range(20)}
    assert len({*tests.values()}) == 20
    assert tests[3] == split(rows, seed=3)[2].texts
    frequency = Counter(text for texts in tests.values() for text in texts)
    assert max(frequency.values()) <= 9, "each text is in about 2 of 20 test splits"


def test_the_split_of_a_seed_never_changes() -> None:
    """Published figures hold only for the split they were measured on."""
    rows = labelled([(f"text {number}", "ab"[number % 2]) for number in range(20)])
    assert split(rows, seed=0)[2].texts == ("text 16", "text 19")


def test_numeric_labels_are_divided_as_one_class() -> None:
    rows = Labelled(tuple(map(str, range(20))), tuple(map(float, range(20))), ((Path("x"), 1),) * 20)
    assert [len(part) for part in split(rows)] == [16, 2, 2]
    alone = Labelled(rows.texts, (), rows.where)
    assert [part.texts for part in split(alone)] == [part.texts for part in split(rows)]
    assert split(alone)[0].labels == ()


@pytest.mark.parametrize("shares", [(1.0,), (0.8, 0.3), (0.8, 0.2, 0.0), (1.2, -0.2), ()])
def test_fractions_must_sum_to_one(shares: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"^fractions must be"):
        split(labelled([("x", "a")] * 9), shares)


def test_too_few_texts_raise() -> None:
    with pytest.raises(ValueError, match=r"^3 distinct texts"):
        split(labelled([("x", "a"), ("y", "a"), ("z", "b"), ("z ", "b")]))


def test_overlap_counts_test_rows() -> None:
    train, test = labelled([("x", "a"), ("y", "b")]), labelled([("x ", "b"), ("x", "a"), ("z", "a")])
    assert overlap(train, test) == 2
    assert overlap(test, train) == 1


def test_labels_become_numbers() -> None:
    rows = labelled([("x", "pos"), ("y", "neg"), ("z", "pos")])
    numbers, classes = encode_labels(rows)
    assert classes == ("neg", "pos")
    assert numbers.tolist() == [1, 0, 1]
    assert numbers.dtype == torch.int64
    assert encode_labels(rows, ["pos", "neu", "neg"])[0].tolist() == [0, 2, 0]
    assert encode_labels(rows.take([0]), classes)[0].tolist() == [1], (
        "one class is enough where all are known"
    )
    assert encode_labels(rows.take([]), classes)[0].tolist() == []


def test_whole_number_labels_are_sorted_by_value() -> None:
    rows = labelled([("x", name) for name in ("10", "9", "-1", "1")])
    assert encode_labels(rows)[1] == ("-1", "1", "9", "10")
    assert encode_labels(labelled([("x", name) for name in ("10", "9", "b")]))[1] == ("10", "9", "b")


def test_unknown_labels_and_single_classes_raise() -> None:
    rows = labelled([("x", "pos"), ("y", "NEG")])
    with pytest.raises(ValueError, match=r"^rows\.csv:3: .*'NEG'.*; did you mean 'neg'\?$"):
        encode_labels(rows, ["neg", "pos"])
    with pytest.raises(ValueError, match=r"^rows\.csv: .*two classes.*'pos'$"):
        encode_labels(rows.take([0]))
    with pytest.raises(ValueError, match=r"two classes .*none$"):
        encode_labels(labelled([]))


def test_numeric_labels(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\nx,3\ny, -0.5 \nz,1e3\n")
    assert read_labelled(tmp_path / "a.csv", numbers=True).labels == (3.0, -0.5, 1000.0)
    (tmp_path / "a.jsonl").write_text('{"text": "x", "label": 3}\n{"text": "y", "label": "0.5"}\n')
    assert read_labelled(tmp_path / "a.jsonl", numbers=True).labels == (3.0, 0.5)


@pytest.mark.parametrize("wrong", ["good", "nan", "inf", "1_000", "1,5", "0x10", "1e999"])
def test_labels_that_are_not_numbers_raise(tmp_path: Path, wrong: str) -> None:
    (tmp_path / "a.csv").write_text(f'text,label\nx,3\ny,"{wrong}"\n')
    with pytest.raises(ValueError, match=rf"a\.csv:3: the label must be .*'{wrong}'"):
        read_labelled(tmp_path / "a.csv", numbers=True)


def test_skip_empty_skips_rows_without_text(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\nx,a\n ,b\n,\nz,b\n")
    rows = read_labelled(tmp_path / "a.csv", skip_empty=True)
    assert rows.texts == ("x", "z")
    assert [line for _, line in rows.skipped] == [3, 4]
    assert [line for _, line in rows.where] == [2, 5]


def test_splits_of_real_data() -> None:
    reviews = read_labelled(shared_data("rt-polarity.pos").with_name("rt-polarity.*"))
    splits = split(reviews, seed=0)
    assert [Counter(part.labels) for part in splits] == [{"pos": n, "neg": n} for n in (4265, 533, 533)]
    titles = read_labelled(shared_data("thucnews-dev.txt"))
    train, test = split(titles, (0.9, 0.1), seed=0)
    assert (len(train), len(test), overlap(train, test)) == (8996, 1004, 0)
    assert encode_labels(test)[1] == tuple("0123456789")
