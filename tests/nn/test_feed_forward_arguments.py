"""Arguments of FeedForward: accepted ones, and errors of one line for others."""

import numpy as np
import pytest
import torch

from ffn.nn import FeedForward
from ffn.nn.feed_forward import gated_hidden_dim


def test_numpy_integers() -> None:
    sizes = np.int64(6), np.int32(10)
    block = FeedForward(*sizes, out_dim=np.uint8(4), save="input", chunk_tokens=np.int64(7))
    assert block(torch.randn(50, 6)).shape == (50, 4)


REFUSED = [
    {"dropout": 1.0},
    {"dropout": "0.1"},
    {"out_dropout": -0.5},
    {"save": "all"},
    {"chunk_tokens": 0, "save": "input"},
    {"chunk_tokens": 2.5, "save": "input"},
    {"dim": -1, "hidden_dim": None},
    {"dim": "6", "hidden_dim": None},
    {"dim": True},
    {"dim": None},
    {"hidden_dim": -3},
    {"out_dim": 0},
    {"activation": "glue"},
    {"backend": "cuda"},
    {"backend": "triton", "activation": torch.sin},
    {"init": "normal"},
]


@pytest.mark.parametrize("options", REFUSED, ids="-".join)
def test_wrong_options_raise_in_the_constructor(options: dict) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(options))}"):
        FeedForward(**{"dim": 6, "hidden_dim": 10} | options)
    with pytest.raises(TypeError, match=r"^activation"):
        FeedForward(6, 10, activation=7)


@pytest.mark.parametrize(
    ("sizes", "name"), [((0,), "dim"), ((-3,), "dim"), ((64.5,), "dim"), ((64, 0), "multiple_of")]
)
def test_gated_hidden_dim_needs_positive_integers(sizes: tuple, name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be "):
        gated_hidden_dim(*sizes)


def test_wrong_inputs_raise_one_line() -> None:
    block = FeedForward(512, 1408, activation="swiglu", bias=False)
    with pytest.raises(ValueError, match=r"^x must be \(\.\.\., 512\)[^\n]*$"):
        block(torch.randn(3, 7))
    with pytest.raises(TypeError, match=r"^gate must be float64[^\n]*\.to\(dtype\)"):
        block(torch.randn(3, 512, dtype=torch.float64))
