"""The registered ops keep torch's contract, and torch's transforms are recognised."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.library import opcheck

from ffn.ops import library
from tests.ops.samples import F64, NAMES

SEED = torch.tensor([3])


@pytest.mark.parametrize("shape", [(), (5,), (4, 3), (2, 3, 5), (0, 3)], ids=str)
@pytest.mark.parametrize("dtype", [F64, torch.bfloat16], ids=str)
def test_drop(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    opcheck(torch.ops.ffn.drop.default, (torch.randn(shape, dtype=dtype), SEED, 0.3))


def test_drop_of_strided_tensors() -> None:
    for x in (torch.randn(5, 4).t(), torch.randn(5, 1).expand(5, 4), torch.randn(5, 8)[:, ::2]):
        opcheck(torch.ops.ffn.drop.default, (x, SEED, 0.3))
        opcheck(torch.ops.ffn.after.default, (x, torch.randn(2)))


@pytest.mark.parametrize("name", NAMES)
def test_activate_and_dactivate(name: str) -> None:
    for rows in (4, 0):
        dh, pre, gate = (torch.randn(rows, 6) for _ in range(3))
        pre_gate = gate if name in ("glu", "bilinear", "reglu", "geglu", "geglu_tanh", "swiglu") else None
        for seed, p in ((None, 0.0), (SEED, 0.3)):
            opcheck(torch.ops.ffn.activate.default, (pre, pre_gate, seed, name, p, 2))
            opcheck(torch.ops.ffn.dactivate.default, (dh, pre, pre_gate, seed, name, p, 2))


def test_ops_are_marked_fit_for_the_compiler() -> None:
    for name in ("drop", "activate", "dactivate", "after"):
        assert torch.Tag.pt2_compliant_tag in getattr(torch.ops.ffn, name).default.tags


@pytest.mark.filterwarnings(
    "ignore:`torch.jit.script` is deprecated:DeprecationWarning"
)  # torch's own, for jvp
def test_transforms_that_want_the_textbook() -> None:
    seen = []

    def ask(x: torch.Tensor) -> torch.Tensor:
        seen.append(library.needs_textbook())
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
    assert not library.needs_textbook()


@pytest.mark.parametrize(
    "wrap", [lambda f: f, torch.func.vmap, torch.func.grad], ids=["plain", "vmap", "grad"]
)
def test_the_same_answer_within_the_compiler(wrap) -> None:
    def ask(x: torch.Tensor) -> torch.Tensor:
        return (x * (2.0 if library.needs_textbook() else 1.0)).sum()

    x = torch.ones(3)
    assert torch.equal(torch.compile(wrap(ask), backend="eager", fullgraph=True)(x), wrap(ask)(x))


@pytest.mark.parametrize("strict", [False, True])
def test_exporting(strict: bool) -> None:
    class Ask(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * (2.0 if library.needs_textbook() else 1.0)

    program = torch.export.export(Ask(), (torch.ones(3),), strict=strict)
    assert torch.equal(program.module()(torch.ones(3)), torch.full((3,), 2.0))


def test_what_autocast_casts() -> None:
    xs = [torch.ones(2, dtype=dtype) for dtype in (torch.float32, torch.float16, F64, torch.int64)]
    xs.append(torch.ones(2, device="meta"))
    assert not any(map(library.autocasts, xs))
    with torch.autocast("cpu", torch.bfloat16):
        assert [library.autocasts(x) for x in xs] == [True, True, False, False, False]
        with torch.autocast("cpu", enabled=False):
            assert not any(map(library.autocasts, xs))


def test_cast_to_what_autocast_wants() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        x, nothing, y = library.cast(torch.ones(2), None, torch.ones(3, dtype=F64))
    assert nothing is None
    assert x.dtype == y.dtype == torch.bfloat16
