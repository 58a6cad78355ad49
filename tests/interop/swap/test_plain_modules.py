"""plain_modules: packed weights are split, and weights are read from plain products only."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ffn.interop.swap.plain_modules import PACKINGS, plain_projection, split_packed
from tests.interop.swap.same import F64

packings = pytest.mark.parametrize("packing", PACKINGS)


def by_hand(packed: Tensor, packing: str) -> tuple[Tensor, Tensor]:
    half = packed.shape[0] // 2
    match packing:
        case "gate_first":
            return packed[:half], packed[half:]
        case "gate_last":
            return packed[half:], packed[:half]
    return packed[0::2], packed[1::2]


@packings
def test_packed_weights_are_split_into_views(packing: str) -> None:
    storage = torch.randn(8, 12, dtype=F64)
    for packed in (
        storage[:, :3],
        storage[0, :6],
        storage.t()[:6],
        storage[:0],
    ):  # also strided and empty
        parts = split_packed(packed, packing)
        assert [torch.equal(a, b) for a, b in zip(parts, by_hand(packed, packing), strict=True)] == [True] * 2
        assert all(t.untyped_storage().data_ptr() == storage.untyped_storage().data_ptr() for t in parts)


@packings
def test_the_gradient_of_a_split_is_packed_the_same_way(packing: str) -> None:
    packed = torch.randn(6, 4, dtype=F64, requires_grad=True)
    factors = torch.randn(2, 3, 4, dtype=F64)
    ours, theirs = (
        torch.autograd.grad((torch.stack(split(packed, packing)) * factors).sum(), packed)
        for split in (split_packed, by_hand)
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def instance_forward(module: nn.Module) -> None:
    original = module.forward
    module.forward = lambda *a: original(*a)


CHANGES = [
    instance_forward,
    lambda module: module.register_forward_hook(lambda *_: None),
    lambda module: module.register_forward_pre_hook(lambda *_: None),
    lambda module: module.register_full_backward_hook(lambda *_: None),
    lambda module: module.register_full_backward_pre_hook(lambda *_: None),
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
def test_a_hooked_or_patched_product_is_not_read(kind: str, change) -> None:
    if kind == "Conv1D":
        module = pytest.importorskip("transformers.pytorch_utils").Conv1D(2, 2)
    else:
        module = nn.Linear(2, 2)
    assert plain_projection(module) is not None
    change(module)
    assert plain_projection(module) is None


def test_a_conv1d_is_read_as_a_view() -> None:
    conv = pytest.importorskip("transformers.pytorch_utils").Conv1D(6, 4)
    weight, bias = plain_projection(conv)
    assert weight.shape == (6, 4)
    assert weight.untyped_storage().data_ptr() == conv.weight.untyped_storage().data_ptr()
    assert bias is conv.bias
    x = torch.randn(3, 4)
    torch.testing.assert_close(F.linear(x, weight, bias), conv(x))
    assert plain_projection(nn.Conv1d(4, 6, 1)) is None
    assert plain_projection(None) is None
