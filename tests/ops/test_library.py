"""The registered ops pass torch's opcheck."""

import pytest
import torch
from torch.library import opcheck

import ffn.ops.dropout  # noqa: F401  (registers the ops)
from tests.ops.samples import F64

SEED = torch.tensor([3])


@pytest.mark.parametrize("shape", [(), (5,), (4, 3), (2, 3, 5), (0, 3)], ids=str)
@pytest.mark.parametrize("dtype", [F64, torch.bfloat16], ids=str)
def test_drop(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    opcheck(torch.ops.ffn.drop.default, (torch.randn(shape, dtype=dtype), SEED, 0.3))


def test_drop_of_strided_tensors() -> None:
    for x in (torch.randn(5, 4).t(), torch.randn(5, 1).expand(5, 4), torch.randn(5, 8)[:, ::2]):
        opcheck(torch.ops.ffn.drop.default, (x, SEED, 0.3))


@pytest.mark.parametrize("count", [0, 5])
def test_dropout_keys(count: int) -> None:
    opcheck(torch.ops.ffn.dropout_keys.default, (SEED, 3, count, 1))
