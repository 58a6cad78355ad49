"""Packed blocks beside the same blocks unpacked."""

import copy

import pytest
import torch
from torch import Tensor

from ffn import FeedForward, pack
from ffn.ops import hardware

ACTIVATIONS = pytest.mark.parametrize("activation", ["gelu", "relu2", "swiglu"])
INT8 = pytest.param(
    "int8",
    marks=pytest.mark.skipif(not hardware.int8_in_onednn(), reason="no int8 matmuls on this processor"),
)
FORMS = pytest.mark.parametrize("form", ["float", INT8])


def build(
    activation: str = "swiglu", form: str = "float", **options
) -> tuple[FeedForward, FeedForward, Tensor]:
    """Return a packed block, the same block unpacked, and tokens."""
    plain = FeedForward(64, 96, activation=activation, **options)
    return pack(copy.deepcopy(plain), form), plain, torch.randn(3, 5, 64)


def assert_same(block: FeedForward, plain: FeedForward, x: Tensor) -> None:
    """Assert that the block runs packed and equals `plain` with its weights; int8 equals int8 packed anew."""
    plain.load_state_dict(block.state_dict())
    with torch.no_grad():
        assert block.explain(x).startswith("packed: ")
        if "int8" in block.explain(x):
            assert torch.equal(block(x), pack(copy.deepcopy(plain), "int8")(x))
            return
        loose = {"atol": 1e-2, "rtol": 2e-2} if x.dtype == torch.bfloat16 else {}
        torch.testing.assert_close(block(x), plain(x), **loose)
