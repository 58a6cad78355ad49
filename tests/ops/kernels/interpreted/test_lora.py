"""LoRA products with the kernels' passes."""

import pytest
import torch

from ffn.activations import TABLE
from ffn.ops import dispatch
from ffn.ops.dropout_mask import noise
from ffn.ops.feed_forward import call
from ffn.ops.options import Options
from tests.ops.test_lora import a_block, leaf, leaves, textbook

F32 = torch.float32


@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_lora_products_with_kernels(
    monkeypatch: pytest.MonkeyPatch, activation: str, chunk: int | None
) -> None:
    seeds = [torch.tensor([s]) for s in (3, 14, 15, 92)]
    of_adapters = iter(seeds[1:])
    monkeypatch.setattr("ffn.ops.lora.draw_seed", lambda device: next(of_adapters))
    monkeypatch.setattr("ffn.ops.feed_forward.draw_seed", lambda device: seeds[0])
    products = a_block(TABLE[activation].gated, True, (True, True, True), (0.2, 0.3, 0.4), dtype=F32)
    x, dy = leaf(8, 6, dtype=F32), torch.randn(8, 5)
    y = call(x, products, Options(activation, 0.25, "input" if chunk else "preact", chunk, "triton"))
    noises = [dispatch.module("triton").noise(seeds[0], 8, 10, 0.25, F32)]
    noises += [noise(s, 8, w, p, F32) for s, w, p in zip(seeds[1:], (6, 10, 6), (0.2, 0.3, 0.4), strict=True)]
    want = textbook(x, products, activation, tuple(noises))
    torch.testing.assert_close(y, want)
    inputs = leaves(x, products)
    torch.testing.assert_close(
        torch.autograd.grad(y, inputs, dy, retain_graph=True),
        torch.autograd.grad(want, inputs, dy, retain_graph=True),
    )
    again = torch.autograd.grad(
        y, inputs, dy, create_graph=True
    )  # by the reference formula, with the same mask
    torch.testing.assert_close(again, torch.autograd.grad(want, inputs, dy, create_graph=True))
