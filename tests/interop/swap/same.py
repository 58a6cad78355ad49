"""Compare a block with its original: outputs, all gradients, and elements saved for backward."""

import pytest
import torch
from torch import Tensor, nn

from tests.kept import kept_for_backward

F64 = torch.float64
# A warning that Dynamo of torch 2.13 causes itself: it instantiates autograd contexts.
DYNAMOS_OWN = pytest.mark.filterwarnings(r"ignore:.*should not be instantiated:DeprecationWarning")


def outcome(block: nn.Module, x: Tensor, seed: int = 0) -> dict[str, Tensor]:
    """Return the output for a copy of x, and the gradients of x and of all trained parameters."""
    x = x.detach().clone().requires_grad_()
    torch.manual_seed(seed)
    y = block(x)
    parameters = {name: p for name, p in block.named_parameters() if p.requires_grad}
    weight = torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).view_as(
        y
    )  # a different cotangent per element
    grads = torch.autograd.grad(y, [x, *parameters.values()], weight)
    return {"y": y.detach(), **dict(zip(["x", *parameters], grads, strict=True))}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    """Assert equal names, shapes and dtypes, and values within `tolerance` of the largest element."""
    assert list(found) == list(expected)
    for name, wanted in expected.items():
        assert found[name].shape == wanted.shape
        assert found[name].dtype == wanted.dtype
        if wanted.numel():
            assert (found[name] - wanted).abs().max() <= tolerance * wanted.abs().max(), name


def kept(block: nn.Module, x: Tensor) -> dict[torch.dtype, int]:
    """Return the elements that autograd saves, by dtype, without the parameters."""
    return kept_for_backward(lambda: block(x), block.parameters())
