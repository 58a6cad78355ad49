"""reroute: copies and files of swapped blocks; other dtypes; quantized, tied and frozen weights."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import ffn
from ffn.interop.swap.reroute import Rerouted
from tests.interop.swap.blocks import KINDS, TORCHS_OWN, Gated, Plain, kinds, pair, rows, swapped
from tests.interop.swap.same import assert_same, outcome

pytestmark = TORCHS_OWN


@kinds
def test_casts_take_effect(kind: str) -> None:
    old, new = pair(kind)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for model in (old, new):
            model.to(dtype)
        x = rows().to(dtype)
        found, expected = outcome(new, x), outcome(old, x)
        assert_same(found, expected, 8 * torch.finfo(dtype).eps)
    model = swapped(KINDS[kind]()).float()
    with torch.autocast("cpu", torch.bfloat16):
        y = model(rows().float())
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@kinds
def test_models_in_other_dtypes_are_swapped(kind: str, dtype: torch.dtype) -> None:
    old = KINDS[kind]().to(dtype)
    new = swapped(copy.deepcopy(old))
    assert_same(outcome(new, rows().to(dtype)), outcome(old, rows().to(dtype)), 8 * torch.finfo(dtype).eps)


def test_tied_and_frozen_weights() -> None:
    old = Gated()
    old.up.weight = old.gate.weight
    old.down.bias.requires_grad_(False)
    new = swapped(copy.deepcopy(old))
    assert new.up.weight is new.gate.weight
    assert_same(outcome(new, rows()), outcome(old, rows()))
    old, new = pair("plain")
    for model in (old, new):
        model.fc2.weight = nn.Parameter(model.fc1.weight.detach().t())
        model.fc1.weight.requires_grad_(False)
    assert_same(outcome(new, rows()), outcome(old, rows()))


def test_dynamic_quantization_takes_effect() -> None:
    from torch.ao.quantization import quantize_dynamic

    model = nn.ModuleList([Plain().float()]).eval()
    expected = quantize_dynamic(copy.deepcopy(model), {nn.Linear})
    ffn.swap(model)
    found = quantize_dynamic(model, {nn.Linear})
    assert "Dynamic" in repr(found)
    x = rows().float()
    assert torch.equal(found[0](x), expected[0](x))


def whole(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "torch.save": whole,
    **{f"pickle {n}": (lambda m, n=n: pickle.loads(pickle.dumps(m, n))) for n in (0, 2, 5)},
}


@pytest.mark.parametrize("name", COPIES)
@kinds
def test_copies_are_swapped_and_independent(kind: str, name: str) -> None:
    model, x = nn.ModuleList([swapped(KINDS[kind](0.2))]).eval(), rows()
    other = COPIES[name](model)
    assert type(other[0]) is type(model[0])
    expected = outcome(model[0], x)
    assert_same(outcome(other[0], x), expected)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    assert_same(outcome(model[0], x), expected)
    assert ffn.unswap(other) == 1
    assert isinstance(model[0], Rerouted)
    assert_same({"y": COPIES[name](other)[0](x)}, {"y": other[0](x)})


def test_state_dicts_load_into_swapped_and_original_blocks() -> None:
    old, new = Gated(), swapped(Gated())
    assert list(vars(new.state_dict())) == list(vars(old.state_dict()))
    new.load_state_dict(old.state_dict())
    assert_same(outcome(new, rows()), outcome(old, rows()))
    old.load_state_dict(swapped(Gated()).state_dict())
    assert_same({"y": torch.func.functional_call(new, old.state_dict(), rows())}, {"y": old(rows())})


class Reduced(Plain):
    def __reduce__(self):
        return Reduced, (), self.__dict__


def test_classes_with_their_own_reduce_are_left_alone() -> None:
    report = ffn.swap(Reduced())
    assert "Reduced" in report[0].reason
    model = swapped(Plain())
    again = type(model)().double()
    again.load_state_dict(model.state_dict())
    assert_same(outcome(again, rows()), outcome(model, rows()))
