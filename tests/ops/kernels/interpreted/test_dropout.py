"""The function `dropout` on the kernel that draws Philox's mask."""

import pytest
import torch

from ffn.ops import dispatch
from ffn.ops.dropout import dropout
from ffn.ops.dropout_mask import draw_seed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(3, 5, 24), (40,), ()], ids=str)
def test_dropout_has_one_mask_both_ways(
    monkeypatch: pytest.MonkeyPatch, shape: tuple, dtype: torch.dtype
) -> None:
    assert dispatch.why_not_triton(torch.device("cpu"), dtype) is None
    kernels = dispatch.module("triton")
    monkeypatch.setattr("ffn.ops.dropout._drawing", lambda *_: kernels)
    x = torch.randn(shape, dtype=dtype)
    x = (x.mT if x.ndim > 1 else x).requires_grad_()  # strided
    torch.manual_seed(3)
    y = dropout(x, 0.3)
    torch.manual_seed(3)
    width = x.shape[-1] if x.ndim else 1
    factors = kernels.noise(draw_seed(x.device), x.numel() // width, width, 0.3, torch.float32).view(x.shape)
    assert torch.equal(y, (x * factors).to(dtype))
    dy = torch.randn(x.shape, dtype=dtype)
    assert torch.equal(torch.autograd.grad(y, x, dy)[0], (dy * factors).to(dtype))
