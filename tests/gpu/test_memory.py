"""Saved elements, peak memory, and tensors of more than 2**31 elements."""

from functools import partial

import pytest
import torch

from ffn.activations import TABLE
from ffn.ops.feed_forward import feed_forward
from tests.gpu.compare import DTYPES, FUSED, ODD, results, sample
from tests.kept import kept_for_backward
from tests.ops.kernels.interpreted.oracle import F64, factors, middle

F32, BF16, _ = DTYPES


@pytest.mark.parametrize("name", ["gelu", "swiglu"])
@pytest.mark.parametrize(("dtype", "case"), [(BF16, FUSED), (F32, ODD)], ids=["fused", "apart"])
def test_saved_elements_exactly(device: torch.device, name: str, dtype: torch.dtype, case: tuple) -> None:
    (N,), (D, H, _) = case
    arguments = sample(name, device, dtype, *case)
    for p, seed in ((0.0, {}), (0.1, {torch.int64: 1})):
        for save, elements in (("preact", D + H * (1 + TABLE[name].gated)), ("input", D)):
            run = partial(feed_forward, *arguments, activation=name, dropout=p, save=save)
            assert kept_for_backward(run, arguments.given()[1:]) == {dtype: N * elements} | seed


def test_peak_memory_is_the_preactivations_and_one_more(device: torch.device) -> None:
    N, D, H = 4096, 256, 8192
    arguments, dy = sample("swiglu", device, BF16, (N,), (D, H, D), False), torch.randn(N, D, device=device)
    peaks = []
    for options in ({}, {"save": "input"}, {"save": "input", "chunk_tokens": 512}):
        run = partial(feed_forward, activation="swiglu", dropout=0.1, **options)
        results(run, arguments, dy)  # warm up: libraries allocate workspaces once
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        results(run, arguments, dy)
        peaks.append((torch.cuda.max_memory_allocated(device) - before) / (N * H * BF16.itemsize))
    preact, saved_input, chunks = peaks
    assert preact <= 3.5
    assert saved_input <= 3.5
    assert chunks <= 2.0


def test_more_than_2_to_the_31_elements(device: torch.device) -> None:
    N, H, p, name = 150_000, 16_384, 0.1, "gelu"
    if torch.cuda.mem_get_info(device)[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of GPU memory")
    pre, dh = (torch.randn(N, H, dtype=BF16, device=device) for _ in range(2))
    rows = [0, 2**31 // H - 1, 2**31 // H, N - 1]
    given, seed = dh[rows].cpu(), torch.tensor([11], device=device)
    h = torch.ops.ffn.act(pre, None, seed, name, p, 0, 0)
    given_pre, dpre = pre[rows].cpu(), pre
    torch.ops.ffn.dact_(dh, pre, None, dpre, None, seed, name, p, 0, 0, True, True)
    noise = torch.cat([factors(11, p, 1, H, row) for row in rows])
    exact = middle(TABLE[name], given, given_pre, None, noise, F64)
    torch.testing.assert_close(h[rows].cpu(), exact.h.to(BF16))
    torch.testing.assert_close(dpre[rows].cpu(), exact.dpre.to(BF16))
    assert all(torch.equal(a, b) for a, b in zip(dh.split(8192), h.split(8192), strict=True))
