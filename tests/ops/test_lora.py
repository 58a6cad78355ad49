"""The op with adapters against the textbook in float64: outputs, every gradient, what is kept."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from ffn.activations import TABLE
from ffn.ops.dropout_mask import noise
from ffn.ops.lora import Factors, adapted_feed_forward
from tests.kept import kept_for_backward

F64 = torch.float64


def leaf(*shape: int, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, dtype=dtype).div_(2).requires_grad_()


def a_block(
    gated: bool, bias: bool, adapted: tuple[bool, ...], dropouts=(0.0, 0.0, 0.0), dtype: torch.dtype = F64
) -> tuple[list, list]:
    """Frozen weights (up, down, gate, their biases) and factors, of D 6, H 10, O 5."""
    shapes = [(10, 6), (5, 10), (10, 6) if gated else None]
    weights = [None if s is None else leaf(*s, dtype=dtype).detach() for s in shapes]
    biases = [None if s is None or not bias else leaf(s[0], dtype=dtype).detach() for s in shapes]
    factors = []
    for (shape, there), p in zip(zip(shapes, adapted, strict=True), dropouts, strict=True):
        made = None
        if shape is not None and there:
            out, width = shape
            made = Factors(leaf(3, width, dtype=dtype), leaf(out, 3, dtype=dtype), 1.5, p)
        factors.append(made)
    return [*weights, *biases], factors


def leaves(x: Tensor, factors: list) -> list[Tensor]:
    return [x, *(t for f in factors if f is not None for t in (f.a, f.b))]


def textbook(x: Tensor, weights: list, factors: list, activation: str, noises=(1.0, 1.0, 1.0, 1.0)) -> Tensor:
    """Hu et al.: W x + b + scale B A (dropped x), product by product; noises of hidden, up, down, gate."""

    def linear(i: int, x: Tensor) -> Tensor:
        y = F.linear(x, weights[i], weights[3 + i])
        f = factors[i]
        return y if f is None else y + f.scale * (x * noises[1 + i]) @ f.a.T @ f.b.T

    act = TABLE[activation]
    h = act(linear(2, x)) * linear(0, x) if act.gated else act(linear(0, x))
    return linear(1, h * noises[0])


def compare(ours: Tensor, theirs: Tensor, inputs: list[Tensor]) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)
    dy = torch.randn_like(theirs)
    for a, b in zip(
        torch.autograd.grad(ours, inputs, dy), torch.autograd.grad(theirs, inputs, dy), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@given(
    st.sampled_from(list(TABLE)),
    st.booleans(),
    st.sampled_from([a for a in itertools.product([True, False], repeat=3) if any(a[:2])]),
    st.sampled_from([(), (1,), (7,), (2, 3), (0,)]),
    st.sampled_from([("preact", None), ("input", None), ("input", 2), ("input", 9)]),
)
def test_outputs_and_gradients_are_the_textbooks(activation, bias, adapted, shape, saved) -> None:
    weights, factors = a_block(TABLE[activation].gated, bias, adapted)
    x = leaf(*shape, 6)
    ours = adapted_feed_forward(
        x, weights, factors, activation=activation, save=saved[0], chunk_tokens=saved[1]
    )
    compare(ours, textbook(x, weights, factors, activation), leaves(x, factors))


@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_dropout_has_the_same_mask_forward_and_back(activation: str, chunk: int | None, monkeypatch) -> None:
    """Of the hidden values and of what each adapter reads: the textbook with the masks spelled out."""
    seeds = [torch.tensor([s]) for s in (3, 14, 15, 92)]
    drawn = iter(seeds)
    monkeypatch.setattr("ffn.ops.lora.draw_seed", lambda device: next(drawn))
    weights, factors = a_block(TABLE[activation].gated, True, (True, True, True), (0.2, 0.3, 0.4))
    x = leaf(8, 6)
    save = "input" if chunk else "preact"
    ours = adapted_feed_forward(
        x, weights, factors, activation=activation, dropout=0.25, save=save, chunk_tokens=chunk
    )
    widths, ps = (10, 6, 10, 6), (0.25, 0.2, 0.3, 0.4)
    noises = [noise(s, 8, w, p, F64) for s, w, p in zip(seeds, widths, ps, strict=True)]
    assert all((n == 0).any() for n in noises)
    compare(ours, textbook(x, weights, factors, activation, tuple(noises)), leaves(x, factors))


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_it_can_be_differentiated_twice(activation: str) -> None:
    weights, factors = a_block(TABLE[activation].gated, True, (True, True, True), (0.2, 0.0, 0.2))
    x = leaf(4, 6)

    def run(*inputs: Tensor) -> Tensor:
        torch.manual_seed(5)
        rest = iter(inputs[1:])
        given = [None if f is None else f._replace(a=next(rest), b=next(rest)) for f in factors]
        options = {"activation": activation, "dropout": 0.2}
        return adapted_feed_forward(inputs[0], weights, given, **options)

    assert torch.autograd.gradcheck(run, leaves(x, factors), check_batched_grad=True)
    assert torch.autograd.gradgradcheck(run, leaves(x, factors))


@pytest.mark.parametrize(("save", "elements"), [("preact", 6 + 2 * 10), ("input", 6)])
def test_it_keeps_what_the_block_keeps(save: str, elements: int) -> None:
    """Under autocast too, where it keeps no copy of a weight, as the block without adapters has to."""
    weights, factors = a_block(True, True, (True, True, True), (0.1, 0.1, 0.1), torch.float32)
    x = leaf(7, 6, dtype=torch.float32)
    known = [t for t in [*weights, *leaves(x, factors)] if t is not None]
    options = {"activation": "swiglu", "dropout": 0.1, "save": save}
    kept = kept_for_backward(lambda: adapted_feed_forward(x, weights, factors, **options), known)
    assert kept == {torch.int64: 4} | ({torch.float32: 7 * (elements - 6)} if save == "preact" else {})
    with torch.autocast("cpu", torch.bfloat16):
        kept = kept_for_backward(lambda: adapted_feed_forward(x, weights, factors, **options), known)
    assert kept == {torch.int64: 4, torch.bfloat16: 7 * elements}


def test_chunks_are_rounded_once() -> None:
    """In bfloat16 the sum over many chunks errs no more than over one."""
    weights, factors = a_block(False, False, (True, True, False), dtype=torch.bfloat16)
    x = leaf(512, 6, dtype=torch.bfloat16)
    wide = [None if f is None else f._replace(a=f.a.double(), b=f.b.double()) for f in factors]
    exact = textbook(x.double(), [None if w is None else w.double() for w in weights], wide, "gelu")
    target = torch.autograd.grad(exact.sum(), factors[0].a)[0].double()
    errors = []
    for chunk in (None, 4):
        y = adapted_feed_forward(x, weights, factors, activation="gelu", save="input", chunk_tokens=chunk)
        errors.append(float((torch.autograd.grad(y.sum(), factors[0].a)[0] - target).norm() / target.norm()))
    assert errors[1] <= 2 * errors[0] + 2**-8
