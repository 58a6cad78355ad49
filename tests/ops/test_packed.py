"""Packed linears: the same products from another layout, and only where that is possible and pays."""

import pytest
import torch
from torch.nn import functional as F

from ffn.ops import dispatch
from ffn.ops.packed import pack_linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [(1,), (3,), (2, 5), ()])
@pytest.mark.parametrize("bias", [True, False])
def test_equals_linear(dtype: torch.dtype, rows: tuple[int, ...], bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(640, 512, generator=generator).to(dtype)
    if not dispatch.packs(weight):
        pytest.skip(f"oneDNN packs no {dtype} on this processor")
    b = torch.randn(640, generator=generator).to(dtype) if bias else None
    x = torch.randn(*rows, 512, generator=generator).to(dtype)
    product = pack_linear(weight, b)
    assert product is not None
    y = product(x, "ignored")
    assert y.dtype == dtype
    assert y.shape == (*rows, 640)
    exact = F.linear(x.double(), weight.double(), None if b is None else b.double())
    terms = x.double().abs() @ weight.double().abs().t()  # the sums' rounding errors grow with these
    bound = 512**0.5 * torch.finfo(torch.float32).eps * terms + torch.finfo(dtype).eps * exact.abs()
    assert ((y.double() - exact).abs() <= bound).all()


def test_what_is_not_packed() -> None:
    wide = torch.zeros(640, 512)
    assert pack_linear(wide[:8], None) is None  # too small to pay
    assert pack_linear(wide.double(), None) is None
    assert pack_linear(wide.to("meta"), None) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert pack_linear(wide, None) is None
