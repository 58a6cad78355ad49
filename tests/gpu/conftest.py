"""Tests that need a GPU; without one they are collected and skipped."""

import warnings
from functools import cache

import pytest
import torch

from ffn.ops import dispatch
from ffn.ops.kernels import tilings
from tests.gpu.compare import fuse_large


@cache
def _warm(device: torch.device) -> None:
    """Run one backward: torch warns at the first matmul in autograd's thread that it sets the context."""
    x = torch.ones(8, 8, device=device, requires_grad=True)
    with warnings.catch_warnings(action="ignore"):
        (x @ x).sum().backward()


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    device = torch.device("cuda", 0)
    reason = dispatch.why_not_triton(device, torch.float32)
    if reason is not None:
        pytest.skip(reason)
    _warm(device)
    monkeypatch.setattr(tilings, "choose", fuse_large)
    return device
