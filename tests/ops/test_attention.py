"""Attention for short sequences against torch's scaled_dot_product_attention, and gradcheck of its rule."""

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ffn.ops.attention import ShortAttentionRule, attend
from tests.kept import kept_for_backward


def heads(B: int, Q: int, T: int, C: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Return q, k, v (B, Q, T, C) as attention creates them: views of (B, T, Q, C)."""
    generator = torch.Generator().manual_seed(T)
    shape = (B, T, Q, C)
    made = [torch.randn(shape, dtype=dtype, generator=generator) for _ in range(3)]
    return [t.transpose(1, 2).requires_grad_() for t in made]


@pytest.mark.parametrize("causal", [True, False])
def test_gradcheck_and_gradgradcheck(causal: bool) -> None:
    inputs = heads(2, 3, 5, 4, torch.float64)
    assert torch.autograd.gradcheck(lambda *t: ShortAttentionRule.apply(*t, causal), inputs)
    assert torch.autograd.gradgradcheck(lambda *t: ShortAttentionRule.apply(*t, causal), inputs)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("T", [2, 33, 96])
def test_equals_torch_sdpa(T: int, causal: bool) -> None:
    q, k, v = heads(2, 3, T, 32, torch.float32)
    exact = [t.detach().double().requires_grad_() for t in (q, k, v)]
    dy = torch.randn(q.shape, generator=torch.Generator().manual_seed(1))
    y = attend(q, k, v, causal=causal)
    assert type(y.grad_fn).__name__ == "ShortAttentionRuleBackward"
    want = F.scaled_dot_product_attention(*exact, is_causal=causal)
    torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-5)
    got = torch.autograd.grad(y, (q, k, v), dy)
    for ours, theirs in zip(got, torch.autograd.grad(want, exact, dy.double()), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)


def test_only_the_attention_weights_are_saved() -> None:
    B, Q, T, C = 2, 3, 8, 4
    inputs = heads(B, Q, T, C, torch.float32)
    for causal in (True, False):
        kept = kept_for_backward(lambda c=causal: attend(*inputs, causal=c), inputs)
        assert kept == {torch.float32: B * Q * T * T}


def test_other_inputs_run_torch_sdpa() -> None:
    """Long sequences, fewer key heads, no gradient, one token: the attention weights are not saved."""
    long = heads(1, 1, 97, 32, torch.float32)  # T > 3 C
    q, k, v = heads(1, 2, 8, 4, torch.float32)
    one = heads(1, 1, 1, 4, torch.float32)
    for case in (long, (q, k[:, :1], v[:, :1]), one):
        y = attend(*case, causal=True)
        assert "ShortAttentionRule" not in type(y.grad_fn).__name__
        want = F.scaled_dot_product_attention(*case, is_causal=True, enable_gqa=True)
        torch.testing.assert_close(y, want)
    with torch.no_grad():
        torch.testing.assert_close(attend(q, k, v, causal=True), attend(q, k, v, causal=True))


def test_under_torch_func() -> None:
    q, k, v = heads(2, 2, 6, 4, torch.float32)
    dq = torch.func.grad(lambda q: attend(q, k, v, causal=True).sum())(q)
    (want,) = torch.autograd.grad(attend(q, k, v, causal=True).sum(), q)
    torch.testing.assert_close(dq, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("create_graph", [False, True])
def test_backward_under_autocast(create_graph: bool) -> None:
    inputs = heads(2, 2, 6, 4, torch.float32)
    y = attend(*inputs, causal=True)
    want = torch.autograd.grad(y.square().sum(), inputs, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.autograd.grad(y.square().sum(), inputs, create_graph=create_graph)
        assert "ShortAttentionRule" not in type(attend(*inputs, causal=True).grad_fn).__name__
    torch.testing.assert_close(got, want)


def test_vectorised_backward() -> None:
    q, k, v = heads(1, 2, 4, 3, torch.float32)
    y = attend(q, k, v, causal=True)
    assert type(y.grad_fn).__name__ == "ShortAttentionRuleBackward"
    dys = torch.randn(3, *y.shape)
    many = torch.autograd.grad(y, (q, k, v), dys, is_grads_batched=True, retain_graph=True)
    for i, dy in enumerate(dys):
        one = torch.autograd.grad(y, (q, k, v), dy, retain_graph=True)
        torch.testing.assert_close([t[i] for t in many], list(one))
    jacobians = [
        torch.autograd.functional.jacobian(lambda q: attend(q, k, v, causal=True), q, vectorize=vectorize)
        for vectorize in (True, False)
    ]
    torch.testing.assert_close(*jacobians)


def test_second_derivative_with_frozen_keys() -> None:
    q, k, v = heads(1, 2, 4, 3, torch.float32)
    frozen = k.detach()
    y = ShortAttentionRule.apply(q, frozen, v, True)
    (dq,) = torch.autograd.grad(y.square().sum(), q, create_graph=True)
    (second,) = torch.autograd.grad(dq.sum(), v)
    with sdpa_kernel(SDPBackend.MATH):
        want = F.scaled_dot_product_attention(q, frozen, v, is_causal=True)
    (dq,) = torch.autograd.grad(want.square().sum(), q, create_graph=True)
    torch.testing.assert_close(second, torch.autograd.grad(dq.sum(), v)[0])
