"""Detection of torch's modes and transforms, also within torch.compile and torch.export."""

import pytest
import torch
from torch.autograd import forward_ad

from ffn.ops import torch_modes

F64 = torch.float64


@pytest.mark.filterwarnings(
    "ignore:`torch.jit.script` is deprecated:DeprecationWarning"
)  # raised by torch for jvp
def test_needs_reference_under_transforms() -> None:
    seen = []

    def ask(x: torch.Tensor) -> torch.Tensor:
        seen.append(torch_modes.needs_reference())
        return x.sum()

    x = torch.ones(3)
    ask(x)
    ask(x.requires_grad_())
    with torch.no_grad():
        ask(x)
    assert seen == [False] * 3
    seen.clear()
    torch.func.vmap(ask)(x)
    torch.func.grad(ask)(x)
    torch.func.jvp(ask, (x,), (x,))
    with forward_ad.dual_level():
        ask(x)
    assert seen == [True] * 4
    assert not torch_modes.needs_reference()


@pytest.mark.parametrize(
    "wrap", [lambda f: f, torch.func.vmap, torch.func.grad], ids=["plain", "vmap", "grad"]
)
def test_needs_reference_within_torch_compile(wrap) -> None:
    def ask(x: torch.Tensor) -> torch.Tensor:
        return (x * (2.0 if torch_modes.needs_reference() else 1.0)).sum()

    x = torch.ones(3)
    assert torch.equal(torch.compile(wrap(ask), backend="eager", fullgraph=True)(x), wrap(ask)(x))


@pytest.mark.parametrize("strict", [False, True])
def test_needs_reference_under_export(strict: bool) -> None:
    class Ask(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * (2.0 if torch_modes.needs_reference() else 1.0)

    program = torch.export.export(Ask(), (torch.ones(3),), strict=strict)
    assert torch.equal(program.module()(torch.ones(3)), torch.full((3,), 2.0))


def test_autocasts() -> None:
    xs = [torch.ones(2, dtype=dtype) for dtype in (torch.float32, torch.float16, F64, torch.int64)]
    xs.append(torch.ones(2, device="meta"))
    assert not any(map(torch_modes.autocasts, xs))
    with torch.autocast("cpu", torch.bfloat16):
        assert [torch_modes.autocasts(x) for x in xs] == [True, True, False, False, False]
        with torch.autocast("cpu", enabled=False):
            assert not any(map(torch_modes.autocasts, xs))
