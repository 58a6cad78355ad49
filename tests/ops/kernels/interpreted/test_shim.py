"""The patched interpreter against torch: bfloat16 rounding, arithmetic and float arguments."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from tests.ops.kernels.interpreted.shim import to_bfloat16, to_float32


def words(x: Tensor) -> np.ndarray:
    return x.view(torch.int16).numpy().view(np.uint16)


@triton.jit
def _arithmetic(x_ptr, y_ptr, sum_ptr, less_ptr, scaled_ptr, factor, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    x, y = tl.load(x_ptr + at), tl.load(y_ptr + at)
    tl.store(sum_ptr + at, x + y)
    tl.store(less_ptr + at, tl.where(x < y, x, y))
    tl.store(scaled_ptr + at, (x.to(tl.float32) * factor).to(tl.bfloat16))


@triton.jit
def _product(x_ptr, y_ptr, z_ptr, M: tl.constexpr, K: tl.constexpr, N: tl.constexpr):
    m, k, n = tl.arange(0, M), tl.arange(0, K), tl.arange(0, N)
    x = tl.load(x_ptr + m[:, None] * K + k[None, :])
    y = tl.load(y_ptr + k[:, None] * N + n[None, :])
    tl.store(z_ptr + m[:, None] * N + n[None, :], tl.dot(x, y, tl.zeros([M, N], tl.float32)))


def test_bfloat16_round_trip_through_float32() -> None:
    every = np.arange(1 << 16, dtype=np.uint16)
    wide = to_float32(every)
    theirs = torch.from_numpy(every.view(np.int16)).view(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(wide, theirs)
    number = ~np.isnan(wide)
    np.testing.assert_array_equal(to_bfloat16(wide)[number], every[number])
    assert np.isnan(to_float32(to_bfloat16(wide[~number]))).all()


@pytest.mark.parametrize("low", [0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF], ids=hex)
def test_rounding_to_nearest_even(low: int) -> None:
    """All upper halves, with lower halves at, below and above the midpoint between two bfloat16 values."""
    x = ((np.arange(1 << 16, dtype=np.uint32) << 16) | np.uint32(low)).view(np.float32)
    x = x[~np.isnan(x)]
    np.testing.assert_array_equal(to_bfloat16(x), words(torch.from_numpy(x).bfloat16()))


def test_arithmetic_and_float_arguments() -> None:
    x, y = torch.randn(1024).bfloat16(), torch.randn(1024).bfloat16()
    added, less, scaled = (torch.empty_like(x) for _ in range(3))
    _arithmetic[1,](x, y, added, less, scaled, 1.0 / 3.0, 1024)
    assert torch.equal(added, x + y)
    assert torch.equal(less, torch.minimum(x, y))
    assert torch.equal(scaled, (x.float() * torch.tensor(1.0 / 3.0)).bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dot(dtype: torch.dtype) -> None:
    x, y = torch.randn(16, 64).to(dtype), torch.randn(64, 32).to(dtype)
    z = torch.empty(16, 32)
    _product[1,](x, y, z, 16, 64, 32)
    torch.testing.assert_close(z, (x.double() @ y.double()).float(), rtol=1e-5, atol=1e-5)
