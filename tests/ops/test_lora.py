"""The rule with LoRA products against the formula in float64: outputs, gradients, saved elements."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from ffn.activations import TABLE
from ffn.ops.dense import Dense
from ffn.ops.dropout_mask import noise
from ffn.ops.feed_forward import call
from ffn.ops.lora import LoRA
from ffn.ops.options import Options
from tests.kept import kept_for_backward

F64 = torch.float64


def leaf(*shape: int, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, dtype=dtype).div_(2).requires_grad_()


def a_block(
    gated: bool, bias: bool, adapted: tuple[bool, ...], dropouts=(0.0, 0.0, 0.0), *,
    frozen: bool = True, dtype: torch.dtype = F64,
) -> tuple:  # fmt: skip
    """Return products (up, down, gate) with D=6, H=10, O=5, each Dense or LoRA."""
    products = []
    for (out, width), there, p in zip([(10, 6), (5, 10), (10, 6)], adapted, dropouts, strict=True):
        weight, offset = leaf(out, width, dtype=dtype), leaf(out, dtype=dtype) if bias else None
        if frozen:
            weight, offset = weight.detach(), None if offset is None else offset.detach()
        factors = leaf(3, width, dtype=dtype), leaf(out, 3, dtype=dtype)
        products.append(LoRA(weight, offset, *factors, None, 1.5, p) if there else Dense(weight, offset))
    return (*products[:2], products[2] if gated else None)


def options(
    activation: str, p: float = 0.0, save: str = "preact", chunk_tokens: int | None = None
) -> Options:
    return Options(activation, p, save, chunk_tokens, "auto")


def tensors(products: tuple) -> list[Tensor]:
    return [t for q in products if q is not None for t in q if isinstance(t, Tensor)]


def leaves(x: Tensor, products: tuple) -> list[Tensor]:
    return [x, *(t for t in tensors(products) if t.requires_grad)]


def textbook(x: Tensor, products: tuple, activation: str, noises=(1.0, 1.0, 1.0, 1.0)) -> Tensor:
    """Return y by Hu et al.: W x + b + scale B A (x * noise) per product.

    noises: for the hidden values and the inputs of the adapters of up, down and gate.
    """

    def linear(i: int, x: Tensor) -> Tensor:
        q = products[i]
        y = F.linear(x, q.weight, q.bias)
        return y if type(q) is Dense else y + q.scale * (x * noises[1 + i]) @ q.a.T @ q.b.T

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
    st.booleans(),
    st.sampled_from([a for a in itertools.product([True, False], repeat=3) if any(a[:2])]),
    st.sampled_from([(), (1,), (7,), (2, 3), (0,)]),
    st.sampled_from([("preact", None), ("input", None), ("input", 2), ("input", 9)]),
)
def test_lora_equals_the_formula(activation, bias, frozen, adapted, shape, saved) -> None:
    """With frozen weights, and with trainable weights."""
    products = a_block(TABLE[activation].gated, bias, adapted, frozen=frozen)
    x = leaf(*shape, 6)
    ours = call(x, products, options(activation, 0.0, *saved))
    compare(ours, textbook(x, products, activation), leaves(x, products))


@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_dropout_has_one_mask_both_ways(activation: str, chunk: int | None, monkeypatch) -> None:
    """The formula with explicit masks for the hidden values and each adapter's input."""
    seeds = [torch.tensor([s]) for s in (3, 14, 15, 92)]
    hidden, *drawn = seeds
    products = a_block(TABLE[activation].gated, True, (True, True, True), (0.2, 0.3, 0.4))
    of_adapters = iter(drawn)
    monkeypatch.setattr("ffn.ops.lora.draw_seed", lambda device: next(of_adapters))
    monkeypatch.setattr("ffn.ops.feed_forward.draw_seed", lambda device: hidden)
    x = leaf(8, 6)
    ours = call(x, products, options(activation, 0.25, "input" if chunk else "preact", chunk))
    widths, ps = (10, 6, 10, 6), (0.25, 0.2, 0.3, 0.4)
    noises = [noise(s, 8, w, p, F64) for s, w, p in zip(seeds, widths, ps, strict=True)]
    assert all((n == 0).any() for n in noises)
    compare(ours, textbook(x, products, activation, tuple(noises)), leaves(x, products))


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_gradcheck_and_gradgradcheck(activation: str, frozen: bool) -> None:
    gated = TABLE[activation].gated
    products = a_block(gated, True, (True, True, True), (0.2, 0.0, 0.2), frozen=frozen)
    x = leaf(4, 6)

    def run(*inputs: Tensor) -> Tensor:
        torch.manual_seed(5)
        rest = iter(inputs[1:])
        replaced = tuple(
            q and type(q)(*(next(rest) if isinstance(t, Tensor) and t.requires_grad else t for t in q))
            for q in products
        )
        return call(inputs[0], replaced, options(activation, 0.2))

    assert torch.autograd.gradcheck(run, leaves(x, products), check_batched_grad=True)
    assert torch.autograd.gradgradcheck(run, leaves(x, products))


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize(("save", "elements"), [("preact", 6 + 2 * 10), ("input", 6)])
def test_saved_elements_equal_the_plain_blocks(save: str, elements: int, frozen: bool) -> None:
    """Also under autocast, where no copy of a weight is saved; the block without adapters saves copies."""
    adapted = True, True, True
    products = a_block(True, True, adapted, (0.1, 0.1, 0.1), frozen=frozen, dtype=torch.float32)
    x = leaf(7, 6, dtype=torch.float32)
    known = [x, *tensors(products)]

    def run() -> Tensor:
        return call(x, products, options("swiglu", 0.1, save))

    kept = kept_for_backward(run, known)
    assert kept == {torch.int64: 4} | ({torch.float32: 7 * (elements - 6)} if save == "preact" else {})
    with torch.autocast("cpu", torch.bfloat16):
        kept = kept_for_backward(run, known)
    assert kept == {torch.int64: 4, torch.bfloat16: 7 * elements}


def test_gradients_over_chunks_are_rounded_once() -> None:
    """In bfloat16 the error of a sum over many chunks is at most that over one."""
    products = a_block(False, False, (True, True, False), dtype=torch.bfloat16)
    x, a = leaf(512, 6, dtype=torch.bfloat16), products[0].a
    wide = tuple(q and type(q)(*(t.double() if isinstance(t, Tensor) else t for t in q)) for q in products)
    exact = textbook(x.double(), wide, "gelu")
    target = torch.autograd.grad(exact.sum(), a)[0].double()
    errors = []
    for chunk in (None, 4):
        y = call(x, products, options("gelu", 0.0, "input", chunk))
        errors.append(float((torch.autograd.grad(y.sum(), a)[0] - target).norm() / target.norm()))
    assert errors[1] <= 2 * errors[0] + 2**-8


@pytest.mark.parametrize(("name", "shape"), [("a", (3, 9)), ("b", (1, 3)), ("a", (18,)), ("b", None)])
def test_factors_that_do_not_fit_are_refused_by_name(name: str, shape: tuple | None) -> None:
    up, down, _ = a_block(False, True, (True, True, False))
    up = up._replace(**{name: None if shape is None else leaf(*shape)})
    with pytest.raises(ValueError, match=f"^lora_{name.upper()} must be "):
        call(leaf(4, 6), (up, down, None), options("gelu"))
