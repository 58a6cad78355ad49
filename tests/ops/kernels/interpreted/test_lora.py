"""Adapters on a GPU: the passes between the products are the kernels'."""

import pytest
import torch

from ffn.activations import TABLE
from ffn.ops import dispatch
from ffn.ops.dropout_mask import noise
from ffn.ops.lora import adapted_feed_forward
from tests.ops.test_lora import a_block, leaf, leaves, textbook

F32 = torch.float32


@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_kernels_between_the_products(
    monkeypatch: pytest.MonkeyPatch, activation: str, chunk: int | None
) -> None:
    choose = dispatch.choose
    kernels = choose("triton", torch.device("cpu"), F32)
    monkeypatch.setattr(
        dispatch, "choose", lambda name, *at: kernels if name == "auto" else choose(name, *at)
    )
    seeds = [torch.tensor([s]) for s in (3, 14, 15, 92)]
    drawn = iter(seeds)
    monkeypatch.setattr("ffn.ops.lora.draw_seed", lambda device: next(drawn))
    weights, factors = a_block(TABLE[activation].gated, True, (True, True, True), (0.2, 0.3, 0.4), F32)
    x, dy = leaf(8, 6, dtype=F32), torch.randn(8, 5)
    options = {"save": "input" if chunk else "preact", "chunk_tokens": chunk, "dropout": 0.25}
    y = adapted_feed_forward(x, weights, factors, activation=activation, **options)
    hidden = dispatch.MODULES["triton"].noise(seeds[0], 8, 10, 0.25, F32)
    of_adapters = [
        noise(s, 8, w, p, F32) for s, w, p in zip(seeds[1:], (6, 10, 6), (0.2, 0.3, 0.4), strict=True)
    ]
    want = textbook(x, weights, factors, activation, (hidden, *of_adapters))
    torch.testing.assert_close(y, want)
    inputs = leaves(x, factors)
    torch.testing.assert_close(
        torch.autograd.grad(y, inputs, dy, retain_graph=True),
        torch.autograd.grad(want, inputs, dy, retain_graph=True),
    )
    again = torch.autograd.grad(y, inputs, dy, create_graph=True)  # by the textbook, with the same mask
    torch.testing.assert_close(again, torch.autograd.grad(want, inputs, dy, create_graph=True))
