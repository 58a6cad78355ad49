"""proof: a wrong plan is refused, saved bytes are counted, and nothing is changed."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from ffn.interop.swap.discover import plans
from ffn.interop.swap.proof import compare, difference, prove
from ffn.interop.swap.reroute import Plan
from tests.interop.swap.blocks import KINDS, LINEARS, kinds
from tests.interop.swap.same import F64

SIZES = {"gated": (26, 36 + 10), "plain": (16, 16 + 10), "sequential": (16, 16 + 10)}


def planned(model: nn.Module) -> Plan:
    (plan,) = plans(model)
    assert isinstance(plan, Plan)
    return plan


@kinds
def test_the_right_plan_is_proved_with_and_without_weights(kind: str) -> None:
    model = KINDS[kind]()
    assert prove(model, planned(model)) is None
    model.to("meta")
    assert prove(model, planned(model)) is None


@kinds
def test_a_wrong_plan_is_refused(kind: str) -> None:
    model = KINDS[kind]()
    plan = planned(model)
    for wrong in ("reglu", "geglu_tanh") if kind == "gated" else ("relu", "gelu_tanh", "quick_gelu"):
        other = replace(plan, inner=replace(plan.inner, activation=wrong))
        for reason in (prove(model, other), compare(model, other)):
            assert isinstance(reason, str)
            assert reason.startswith("its numbers differ")
    if kind == "gated":
        other = replace(plan, inner=replace(plan.inner, gate=1 - (plan.inner.gate or 0)))
        assert prove(model, other) is not None


@kinds
@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
def test_bytes_per_token_before_and_after(kind: str, dtype: torch.dtype) -> None:
    model = KINDS[kind]().to(dtype)
    kept = compare(model, planned(model))
    assert isinstance(kept, tuple)
    before, after = kept
    assert after == SIZES[kind][0] * dtype.itemsize
    assert before >= SIZES[kind][1] * dtype.itemsize


@kinds
def test_dropout_adds_bytes_to_the_original_only(kind: str) -> None:
    model, dropping = KINDS[kind](), KINDS[kind](0.5)
    (before, after), (more, same) = (compare(m, planned(m)) for m in (model, dropping))
    assert more > before
    assert same == pytest.approx(after, abs=2)  # a seed


@kinds
def test_comparing_changes_nothing(kind: str) -> None:
    model = KINDS[kind](0.5).train()
    state, weights = torch.get_rng_state(), copy.deepcopy(model.state_dict())
    plan = planned(model)
    assert prove(model, plan) is None
    assert isinstance(compare(model, plan), tuple)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(m.training for m in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


@kinds
def test_nan_and_meta_weights_are_refused(kind: str) -> None:
    model = KINDS[kind]()
    plan = planned(model)
    with torch.no_grad():
        model.get_submodule(LINEARS[kind][0]).weight[0, 0] = float("nan")
    assert isinstance(compare(model, plan), str)
    assert compare(model.to("meta"), plan) == "its weights are on the meta device: load them first"


def raises(x: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("first line\nsecond line")


@pytest.mark.parametrize("old", [raises, torch.relu_, lambda x: x.add_(1)])
def test_code_that_raises_or_changes_its_input_is_refused(old) -> None:
    x = torch.randn(2, 4, 6, requires_grad=True)
    before = x.detach().clone()
    reason = difference(nn.Identity(), x, old, lambda x: x + 1)
    assert reason is not None
    assert ("first line" if old is raises else "in place") in reason
    assert "second line" not in reason
    assert torch.equal(x, before)
