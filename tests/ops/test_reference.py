"""The reference formula against the NumPy oracle, nn.Sequential and an example worked by hand."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ffn.activations import TABLE
from ffn.ops import reference
from ffn.ops.dense import Dense
from ffn.ops.feed_forward import feed_forward
from tests.ops import textbook
from tests.ops.samples import F64, NAMES, Arguments, by_reference, draw, gradients


def to_numpy(arguments: Arguments) -> tuple[np.ndarray, textbook.Weights]:
    x, *weights = (None if t is None else t.detach().numpy() for t in arguments)
    return x, textbook.Weights(*weights)


def factors(rows: int, cols: int) -> Tensor:
    return (torch.rand(rows, cols) < 0.7).to(F64) / 0.7


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("dropout", [True, False], ids=["dropout", "no_dropout"])
def test_reference_equals_numpy(name: str, bias: bool, dropout: bool) -> None:
    arguments = draw(name, bias=bias)
    noise = factors(7, 10) if dropout else None
    y = by_reference(*arguments, activation=TABLE[name], noise=noise)
    dy = torch.randn_like(y)

    x, weights = to_numpy(arguments)
    by_hand = {"activation": name, "noise": 1.0 if noise is None else noise.numpy()}
    np.testing.assert_allclose(
        y.detach().numpy(), textbook.forward(x, weights, **by_hand), rtol=1e-10, atol=1e-12
    )
    dx, dweights = textbook.backward(dy.numpy(), x, weights, **by_hand)
    by_numpy = [grad for grad, t in zip((dx, *dweights), arguments, strict=True) if t is not None]
    for ours, theirs in zip(gradients(y, arguments, dy), by_numpy, strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-9, atol=1e-9)


def test_worked_example() -> None:
    W, x, b = [[2.0, 1.0], [1.0, 3.0]], [1.0, 2.0], [0.0, 1.0]
    np.testing.assert_array_equal(textbook.affine(np.array(x), np.array(W), np.array(b)), [4.0, 8.0])
    up, bias, down = torch.tensor(W), torch.tensor(b), torch.eye(2)
    products = Dense(up, bias), Dense(down)
    y = reference.feed_forward(torch.tensor(x), *products, activation=TABLE["identity"])
    assert y.tolist() == [4.0, 8.0]
    assert feed_forward(torch.tensor(x), up, down, up_bias=bias, activation="identity").tolist() == [4.0, 8.0]


def test_reference_equals_nn_sequential() -> None:
    sequential = nn.Sequential(nn.Linear(6, 10), nn.GELU(), nn.Linear(10, 5))
    x = torch.randn(2, 3, 6)
    up, _, down = sequential
    y = reference.feed_forward(x, up, down, activation=TABLE["gelu"])
    assert torch.equal(y, sequential(x))


def test_leading_shapes_and_zero_noise() -> None:
    arguments = draw("swiglu", shape=(2, 3, 4))
    noise = torch.zeros(2, 3, 4, 10, dtype=F64)
    y = by_reference(*arguments, activation=TABLE["swiglu"], noise=noise)
    assert torch.equal(y, arguments.down_bias.expand(2, 3, 4, 5))
