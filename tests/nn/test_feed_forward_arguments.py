"""What FeedForward is built from and called with, and what it refuses in one line."""

import re

import numpy as np
import pytest
import torch

from ffn.nn import FeedForward
from ffn.nn.feed_forward import gated_hidden_dim


def test_whole_numbers_of_numpy() -> None:
    sizes = np.int64(6), np.int32(10)
    block = FeedForward(*sizes, out_dim=np.uint8(4), save="input", chunk_tokens=np.int64(7))
    assert block(torch.randn(50, 6)).shape == (50, 4)


REFUSED = [
    ({"activation": "glue"}, "activation"),
    ({"dropout": 1.5}, r"dropout=1.5: want a probability in \[0, 1\)"),
    ({"out_dropout": 1.0}, r"out_dropout=1.0: want a probability in \[0, 1\)"),
    ({"save": "everything"}, r"save='everything': want one of preact, input"),
    ({"chunk_tokens": 8}, r"chunk_tokens=8 with save='preact': want save='input'$"),
    ({"save": "input", "chunk_tokens": 0}, "chunk_tokens=0: want a positive whole number$"),
    ({"save": "input", "chunk_tokens": 2.5}, "chunk_tokens=2.5: want a positive whole number$"),
    ({"dim": -1, "hidden_dim": None}, "dim=-1: want a positive whole number$"),
    ({"dim": "6", "hidden_dim": None}, "dim='6': want a positive whole number$"),
    ({"dim": True}, "dim=True: want a positive whole number$"),
    ({"dim": None}, "dim=None: want a positive whole number$"),
    ({"hidden_dim": -3}, "hidden_dim=-3: want a positive whole number$"),
    ({"out_dim": 0}, "out_dim=0: want a positive whole number$"),
    ({"dropout": "0.1"}, r"dropout='0\.1': want a probability in \[0, 1\)$"),
    ({"backend": "cuda"}, r"backend='cuda': no such backend; choose one of auto, eager, triton, reference"),
    (
        {"backend": "triton", "activation": torch.sin},
        r"backend='triton': no kernel has sin; use 'auto', or a",
    ),
    ({"init": "normal"}, "init"),
]


@pytest.mark.parametrize(("options", "text"), REFUSED)
def test_options_are_refused_when_the_block_is_built(options: dict, text: str) -> None:
    with pytest.raises(ValueError, match=f"^{text}"):
        FeedForward(**{"dim": 6, "hidden_dim": 10} | options)
    with pytest.raises(TypeError, match="activation"):
        FeedForward(6, 10, activation=7)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [((0,), "dim=0"), ((-3,), "dim=-3"), ((64.5,), "dim=64.5"), ((64, 0), "multiple_of=0")],
)
def test_a_width_follows_from_whole_numbers(sizes: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}: want a positive whole number$"):
        gated_hidden_dim(*sizes)


def test_inputs_are_refused_in_one_line() -> None:
    block = FeedForward(512, 1408, activation="swiglu", bias=False)
    rule = "x (..., 512), gate (1408, 512), up (1408, 512), down (512, 1408); got x (3, 7), "
    text = re.escape(f"feed_forward(activation='swiglu') wants {rule}")
    with pytest.raises(ValueError, match=rf"^{text}[^\n]*$"):
        block(torch.randn(3, 7))
    with pytest.raises(
        TypeError, match=r"wants one floating dtype; got x float64, gate float32.*\.to\(dtype\)"
    ):
        block(torch.randn(3, 512, dtype=torch.float64))
