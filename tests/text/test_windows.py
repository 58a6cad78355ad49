"""Batches: batch i depends on i alone, and every token is predicted as often as it should be."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ffn.text.windows import IGNORED, Batches, gather, validation_batches

SIZES = {
    "n": st.integers(2, 200),
    "window": st.integers(1, 20),
    "batch": st.integers(1, 5),
    "seed": st.integers(0, 9),
}


@given(**SIZES, index=st.integers(0, 500))
def test_a_batch_depends_only_on_seed_and_index(
    n: int, window: int, batch: int, seed: int, index: int
) -> None:
    window = min(window, n - 1)
    tokens = torch.arange(n, dtype=torch.int32)
    in_order = Batches(tokens, window, batch, seed)
    for i in range(index % 7):
        in_order(i)
    x, y = in_order(index)
    again = Batches(tokens, window, batch, seed)(index)
    assert torch.equal(x, again[0])
    assert torch.equal(y, again[1])
    assert torch.equal(y, x + 1), "targets are the next tokens"
    assert x.shape == (batch, window)
    assert x.dtype == torch.int64


@given(**SIZES)
def test_an_epoch_visits_each_window_once(n: int, window: int, batch: int, seed: int) -> None:
    window = min(window, n - 1)
    batches = Batches(torch.arange(n, dtype=torch.int32), window, 1, seed)
    count = batches.windows_per_epoch
    for epoch in range(3):
        seen = torch.cat([batches(epoch * count + i)[0] for i in range(count)]).flatten()
        assert len(seen.unique()) == len(seen) == count * window, "windows do not overlap"
        assert int(seen.max()) - int(seen.min()) == len(seen) - 1, "windows leave no gap"
        assert len(seen) > n - 1 - 2 * window, "only the ends are left out"


def test_epochs_and_seeds_differ() -> None:
    tokens = torch.arange(1000, dtype=torch.int32)
    batches = Batches(tokens, 10, 99, seed=1)
    assert not torch.equal(batches(0)[0], batches(1)[0])
    assert not torch.equal(batches(0)[0], Batches(tokens, 10, 99, seed=2)(0)[0])


@given(**{k: SIZES[k] for k in ("n", "window", "batch")})
def test_validation_scores_each_token_once_in_full_windows(n: int, window: int, batch: int) -> None:
    tokens = torch.arange(n, dtype=torch.int32)
    scored = []
    for x, y in validation_batches(tokens, window, batch):
        assert x.shape == (len(x), min(window, n - 1))
        counted = y != IGNORED
        assert torch.equal(y[counted], x[counted] + 1)
        scored += y[counted].tolist()
    assert sorted(scored) == list(range(1, n))


def test_limited_validation_batches_are_evenly_spread() -> None:
    tokens = torch.arange(101, dtype=torch.int32)
    starts = [int(x[0, 0]) for x, _ in validation_batches(tokens, 10, 2, limit=2)]
    assert starts == [0, 40]
    assert len(list(validation_batches(tokens, 10, 2, limit=50))) == 5


def test_gather_returns_windows_and_next_tokens() -> None:
    x, y = gather(torch.arange(10, dtype=torch.uint8), [0, 6], 3)
    assert x.tolist() == [[0, 1, 2], [6, 7, 8]]
    assert y.tolist() == [[1, 2, 3], [7, 8, 9]]
    x, y = gather(torch.arange(10, dtype=torch.uint8), [0], 3)
    y.zero_()
    assert x.tolist() == [[0, 1, 2]], "inputs and targets are two tensors"


def test_a_text_shorter_than_a_window_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 9 tokens, got 5"):
        Batches(torch.zeros(5, dtype=torch.uint8), 8, 1, 0)
