"""reroute: compilers, tracers, transforms and optimizers work on swapped blocks."""

import copy

import pytest
import torch

import ffn
from tests.interop.swap.blocks import KINDS, TORCHS_OWN, Gated, kinds, pair, rows, swapped
from tests.interop.swap.same import assert_same, outcome

pytestmark = [*TORCHS_OWN, pytest.mark.usefixtures("nothing_compiled")]


@kinds
def test_compile_export_trace_and_transforms_give_the_same(kind: str) -> None:
    old, new = pair(kind)
    x = rows()
    expected = outcome(old, x)
    compiled = torch.compile(new, fullgraph=True, backend="aot_eager")
    found = outcome(compiled, x)
    assert_same(dict(zip(expected, found.values(), strict=True)), expected)
    assert_same({"y": torch.export.export(new, (x,)).module()(x)}, {"y": expected["y"]})
    assert_same({"y": torch.fx.symbolic_trace(new)(x)}, {"y": expected["y"]})
    assert_same({"y": torch.vmap(new)(x)}, {"y": expected["y"]})
    assert_same({"y": torch.func.jvp(new, (x,), (x,))[1]}, {"y": torch.func.jvp(old, (x,), (x,))[1]})


def test_a_compiled_model_can_be_swapped() -> None:
    old = Gated()
    compiled, x = torch.compile(copy.deepcopy(old), backend="eager"), rows()
    compiled(x)
    assert len(ffn.swap(compiled).swapped) == 1
    assert_same({"y": compiled(x)}, {"y": old(x)})


@kinds
def test_training_goes_on_through_swap_and_unswap(kind: str) -> None:
    old = KINDS[kind]()
    new = copy.deepcopy(old)
    optimizers = [torch.optim.AdamW(m.parameters(), 0.01) for m in (old, new)]
    x = rows()

    def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()

    for stage in ("before", "swapped", "after"):
        if stage == "swapped":
            swapped(new)
        for _ in range(2):
            step(old, optimizers[0])
            step(new, optimizers[1])
        if stage == "swapped":
            ffn.unswap(new)
            for group, other in zip(*(o.state.values() for o in optimizers), strict=True):
                assert_same({"m": group["exp_avg"]}, {"m": other["exp_avg"]}, 1e-9)
            old.load_state_dict(new.state_dict())
            optimizers[0].load_state_dict(copy.deepcopy(optimizers[1].state_dict()))
    assert_same(new.state_dict(), old.state_dict(), 0.0)
