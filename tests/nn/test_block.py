"""The block against its formulas, with parts that do not commute, so that their order shows."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from ffn.nn.attention import Attention, LayerCache
from ffn.nn.block import Block
from ffn.nn.feed_forward import FeedForward
from ffn.nn.norm import build_norm

F64 = torch.float64


def build(**options) -> Block:
    attention = Attention(8, 2, dtype=F64)
    feed_forward = FeedForward(8, 12, activation="swiglu", dtype=F64)
    block = Block(attention, feed_forward, partial(build_norm, "layernorm", 8, dtype=F64), **options)
    for p in block.parameters():
        nn.init.normal_(p)
    return block


FORMULAS = {
    ("pre", False): lambda x, a, f, n, m: (y := x + a(n(x))) + f(m(y)),
    ("post", False): lambda x, a, f, n, m: m((y := n(x + a(x))) + f(y)),
    ("pre", True): lambda x, a, f, n, m: x + a(n(x)) + f(n(x)),
    ("post", True): lambda x, a, f, n, m: n(x + a(x) + f(x)),
    ("output", False): lambda x, a, f, n, m: (y := x + n(a(x))) + m(f(y)),
}


@pytest.mark.parametrize(("position", "parallel"), FORMULAS)
def test_block_equals_its_formula(position: str, parallel: bool) -> None:
    block = build(norm_position=position, parallel=parallel)
    x = torch.randn(2, 5, 8, dtype=F64)
    parts = block.attention, block.feed_forward, block.attention_norm, block.feed_forward_norm
    torch.testing.assert_close(block(x), FORMULAS[position, parallel](x, *parts))


def test_output_and_sandwich_norms_equal_their_formulas() -> None:
    block = build(norm_position="sandwich")
    x = torch.randn(2, 5, 8, dtype=F64)
    y = x + block.attention_out_norm(block.attention(block.attention_norm(x)))
    expected = y + block.feed_forward_out_norm(block.feed_forward(block.feed_forward_norm(y)))
    torch.testing.assert_close(block(x), expected)


def test_a_parallel_block_with_two_norms() -> None:
    block = build(parallel=True, shared_norm=False)
    x = torch.randn(2, 5, 8, dtype=F64)
    n, m = block.attention_norm(x), block.feed_forward_norm(x)
    torch.testing.assert_close(block(x), x + block.attention(n) + block.feed_forward(m))


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"parallel": True, "norm_position": "output"}, "norm_position"),
        ({"shared_norm": False}, "shared_norm"),
        ({"shared_norm": False, "parallel": True, "norm_position": "post"}, "shared_norm"),
        ({"norm_position": "middle"}, "norm_position"),
    ],
)
def test_options_that_do_not_fit_together_raise(options: dict, name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}"):
        build(**options)


def test_a_parallel_block_has_one_norm() -> None:
    children = {
        parallel: [name for name, _ in build(parallel=parallel).named_children()] for parallel in (0, 1)
    }
    assert children[0] == ["attention_norm", "attention", "feed_forward_norm", "feed_forward"]
    assert children[1] == ["attention_norm", "attention", "feed_forward"]


def test_mask_rotary_and_cache_reach_attention() -> None:
    class Spy(nn.Module):
        def forward(self, x: Tensor, *rest) -> Tensor:
            self.rest = rest
            return torch.zeros_like(x)

    spy, x, rest = Spy(), torch.randn(1, 2, 8), (object(), object(), LayerCache(1))
    for position in ("pre", "post"):
        for parallel in (False, True):
            block = Block(spy, nn.Identity(), nn.Identity, norm_position=position, parallel=parallel)
            torch.testing.assert_close(block(x, *rest), 2 * x)
            assert spy.rest == rest
