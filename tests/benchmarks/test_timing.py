"""The ratio that is quoted."""

from statistics import median

from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.timing import speedup

SECONDS = st.lists(st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)), min_size=1, max_size=9)


def test_a_speedup_is_the_ratio_of_medians() -> None:
    assert speedup([2.0, 4.0, 100.0], [1.0, 2.0, 1.5])[0] == 4.0 / 1.5
    assert speedup([3.0] * 5, [2.0] * 5) == (1.5, 1.5, 1.5)


@given(SECONDS)
@settings(max_examples=30)
def test_its_interval_lies_within_what_the_rounds_allow(rounds: list[tuple[float, float]]) -> None:
    base, other = (list(side) for side in zip(*rounds, strict=True))
    ratio, low, high = speedup(base, other, draws=50)
    assert ratio == median(base) / median(other)
    assert min(base) / max(other) <= low <= high <= max(base) / min(other)
