"""The norms against their formulas, and the rule of RMSNorm against torch's autograd."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ffn.nn.norm import RMSNorm, RMSNormRule, build_norm, rms_norm
from tests.kept import kept_for_backward


def test_norms_equal_their_formulas() -> None:
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    weight = torch.randn(8, dtype=torch.float64)
    rms = x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6) * weight
    torch.testing.assert_close(rms_norm(x, weight, 1e-6), rms)
    torch.testing.assert_close(rms_norm(x, weight.clone().requires_grad_(), 1e-6), rms)
    norm = build_norm("layernorm", 8, 1e-6, dtype=torch.float64)
    centred = x - x.mean(-1, keepdim=True)
    torch.testing.assert_close(norm(x), centred / torch.sqrt(x.var(-1, correction=0, keepdim=True) + 1e-6))


def test_modules_are_torchs() -> None:
    assert type(build_norm("layernorm", 8, 1e-3)) is nn.LayerNorm
    norm = build_norm("rmsnorm", 8, 1e-3, device="meta", dtype=torch.bfloat16)
    assert isinstance(norm, RMSNorm)
    assert isinstance(norm, nn.RMSNorm)
    assert norm.weight.is_meta
    assert norm.weight.dtype == torch.bfloat16
    assert list(norm.state_dict()) == ["weight"]
    assert norm.eps == 1e-3


@pytest.mark.parametrize("shape", [(5, 8), (2, 3, 4, 8), (8,), (0, 8)])
def test_the_rule_equals_torchs_gradient(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(8, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(shape, dtype=torch.float64)
    ours = torch.autograd.grad(rms_norm(x, weight, 1e-5), (x, weight), dy)
    theirs = torch.autograd.grad(F.rms_norm(x, (8,), weight, 1e-5), (x, weight), dy)
    torch.testing.assert_close(ours, theirs)


def test_the_rule_passes_gradcheck_twice() -> None:
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: rms_norm(a, b, 1e-5), (x, weight))
    assert torch.autograd.gradgradcheck(lambda a, b: rms_norm(a, b, 1e-5), (x, weight))


def test_strided_gradients_and_inputs() -> None:
    x = torch.randn(4, 3, 6, dtype=torch.float64).transpose(0, 1).requires_grad_()
    dy = torch.randn(4, 3, 6, dtype=torch.float64).transpose(0, 1)
    weight = torch.randn(6, dtype=torch.float64, requires_grad=True)
    strided = torch.autograd.grad(rms_norm(x, weight), (x, weight), dy)
    plain = torch.autograd.grad(rms_norm(x.contiguous(), weight), (x, weight), dy.contiguous())
    torch.testing.assert_close(strided, plain)


def test_bytes_saved_for_backward() -> None:
    x, weight = torch.randn(5, 8, requires_grad=True), torch.ones(8, requires_grad=True)
    assert kept_for_backward(lambda: rms_norm(x, weight), [weight]) == {torch.float32: 5 * 8 + 5}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_dtype(dtype: torch.dtype) -> None:
    x = torch.randn(4, 8, dtype=dtype, requires_grad=True)
    for weight in (torch.ones(8), torch.ones(8, dtype=dtype)):
        y = rms_norm(x, weight)
        assert y.dtype == dtype
        exact = F.rms_norm(x.detach().double(), (8,), eps=1e-5)
        torch.testing.assert_close(y.double(), exact, atol=1e-2, rtol=1e-2)
    rms_norm(x, torch.ones(8)).sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == dtype


def test_torch_func_compile_and_eps_none() -> None:
    x, weight = torch.randn(4, 8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    per_row = torch.func.vmap(torch.func.grad(lambda w, row: rms_norm(row, w).sum()), (None, 0))(weight, x)
    leaf = weight.clone().requires_grad_()
    rms_norm(x, leaf).sum().backward()
    torch.testing.assert_close(per_row.sum(0), leaf.grad)
    torch.testing.assert_close(rms_norm(x, leaf, None), F.rms_norm(x, (8,), leaf))


def test_unknown_norm_raises() -> None:
    with pytest.raises(ValueError, match=r"^norm .*got 'batchnorm'"):
        build_norm("batchnorm", 8)


def test_the_rule_is_used_on_the_cpu() -> None:
    x = torch.randn(2, 8, requires_grad=True)
    assert type(rms_norm(x, torch.ones(8)).grad_fn).__name__ == f"{RMSNormRule.__name__}Backward"


def test_vectorised_backward() -> None:
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, dtype=torch.float64, requires_grad=True)
    fast = torch.autograd.functional.jacobian(rms_norm, (x, weight), vectorize=True)
    slow = torch.autograd.functional.jacobian(rms_norm, (x, weight))
    torch.testing.assert_close(fast, slow)


def test_a_second_derivative_with_a_frozen_input() -> None:
    x, weight = torch.randn(3, 4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    weight.requires_grad_()
    (dweight,) = torch.autograd.grad(rms_norm(x, weight).pow(3).sum(), weight, create_graph=True)
    (second,) = torch.autograd.grad(dweight.sum(), weight)
    n = F.rms_norm(x, (4,), eps=1e-5)
    torch.testing.assert_close(second, (6 * n.pow(3) * weight).sum(0))


@pytest.mark.parametrize("grad", [True, False])
def test_rmsnorm1p_adds_one_to_its_weight(grad: bool) -> None:
    norm, plain = (
        build_norm("rmsnorm1p", 6, dtype=torch.float64),
        build_norm("rmsnorm", 6, dtype=torch.float64),
    )
    assert not norm.weight.any()
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=grad)
    with torch.no_grad():
        norm.weight.normal_()
        plain.weight.copy_(1.0 + norm.weight)
    torch.testing.assert_close(norm(x), plain(x))
    if grad:
        ours = torch.autograd.grad(norm(x).square().sum(), (x, norm.weight))
        torch.testing.assert_close(ours, torch.autograd.grad(plain(x).square().sum(), (x, plain.weight)))
    half = norm.to(torch.bfloat16)
    rounded = x.detach().bfloat16()
    expected = F.rms_norm(rounded.float(), (6,), 1.0 + half.weight.float(), 1e-5).bfloat16()
    assert torch.equal(half(rounded), expected)
