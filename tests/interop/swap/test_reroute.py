"""reroute: a later change to a swapped block takes effect."""

import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

import ffn
from tests.interop.swap.blocks import (
    LINEARS,
    TORCHS_OWN,
    Gated,
    Plain,
    kinds,
    pair,
    rows,
    runs_old,
    sequential,
    swapped,
)
from tests.interop.swap.same import F64, assert_same, outcome

pytestmark = TORCHS_OWN


def scale_it(m: nn.Module) -> nn.Module:
    return nn.Sequential(m, nn.Hardtanh(-0.2, 0.2))


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def overwrite_forward(m: nn.Module) -> None:
    old = m.forward
    m.forward = lambda x: 2 * old(x)


def change(name: str, m: nn.Module, child: str) -> None:
    linear = m.get_submodule(child)
    D, H = linear.in_features, linear.out_features
    match name:
        case "another Linear":
            m._modules[child] = nn.Linear(D, H, dtype=F64)
            torch.manual_seed(1)
            m._modules[child].reset_parameters()
        case "a subclass":
            m._modules[child] = Doubled(D, H, dtype=F64)
            m._modules[child].load_state_dict(linear.state_dict())
        case "wrapped":
            m._modules[child] = scale_it(linear)
        case "forward hook":
            linear.register_forward_hook(lambda _, args, y: 2 * y)
        case "pre hook":
            linear.register_forward_pre_hook(lambda _, args: (2 * args[0],))
        case "backward hook":
            linear.register_full_backward_hook(
                lambda _, dx, dy: tuple(None if d is None else 2 * d for d in dx)
            )
        case "backward pre hook":
            linear.register_full_backward_pre_hook(lambda _, dy: tuple(2 * d for d in dy))
        case "weight norm":
            nn.utils.parametrizations.weight_norm(linear)
            with torch.no_grad():
                linear.parametrizations.weight.original0.mul_(2)
        case "orthogonal":
            nn.utils.parametrizations.orthogonal(linear, use_trivialization=False)
        case "spectral norm":
            nn.utils.parametrizations.spectral_norm(linear)
        case "prune":
            prune.l1_unstructured(linear, "weight", 0.5)
        case "forward":
            overwrite_forward(linear)
        case "new weight":
            linear.weight = nn.Parameter(linear.weight.detach() * 2)
        case "no bias":
            linear.bias = None
        case "weight in place":
            with torch.no_grad():
                linear.weight.mul_(2)


CHANGES = [
    "another Linear", "a subclass", "wrapped", "forward hook", "pre hook", "backward hook",
    "backward pre hook", "weight norm", "orthogonal", "spectral norm", "prune", "forward", "new weight",
    "no bias", "weight in place",
]  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize(("kind", "child"), [(k, c) for k, cs in LINEARS.items() for c in cs])
def test_a_change_to_a_product_takes_effect(kind: str, child: str, name: str) -> None:
    old, new = pair(kind)
    x = rows()
    before = outcome(old, x)
    for model in (old, new):
        torch.manual_seed(3)
        change(name, model, child)
    expected = outcome(old, x)
    assert_same(outcome(new, x), expected)
    same = [a.shape == b.shape and torch.equal(a, b) for a, b in zip(before.values(), expected.values())]  # noqa: B905
    assert not all(same), "the change must have an effect"
    if name not in ("another Linear", "new weight", "no bias", "weight in place"):
        assert runs_old(new)


def test_every_hook_of_every_child_fires_once() -> None:
    for name, _ in Gated().named_children():
        for register in ("forward_pre_hook", "forward_hook", "full_backward_pre_hook", "full_backward_hook"):
            model, fired = swapped(Gated()), []
            hook = getattr(model.get_submodule(name), f"register_{register}")
            handle = hook(lambda *_, fired=fired: fired.append(1))
            model(rows().requires_grad_()).sum().backward()
            assert fired == [1], (name, register)
            handle.remove()
            model(rows())
            assert fired == [1]
            assert not runs_old(model)


def test_hooks_of_the_block_of_weights_and_of_all_modules_fire() -> None:
    model, fired = swapped(Gated()), []
    model.register_forward_hook(lambda *_: fired.append("block"))
    model.down.weight.register_hook(lambda _: fired.append("weight"))
    model.up.weight.register_post_accumulate_grad_hook(lambda _: fired.append("grad"))
    model(rows()).sum().backward()
    assert sorted(fired) == ["block", "grad", "weight"]
    names: list[str] = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: names.append(type(m).__name__))
    model(rows())
    handle.remove()
    assert sorted(names) == ["Dropout", "Gated", "LayerNorm", "Linear", "Linear", "Linear", "SiLU"]


class Sharper(nn.SiLU):
    def forward(self, x):
        return super().forward(2 * x)


LATER = {
    "another act": lambda m: setattr(m, "act", nn.Tanh()),
    "an act of a subclass": lambda m: setattr(m, "act", Sharper()),
    "a hook on the act": lambda m: m.act.register_forward_hook(lambda _, args, y: 2 * y),
    "forward of the act": lambda m: overwrite_forward(m.act),
    "the multiplier": lambda m: setattr(m, "scale", 2.0),
    "a tensor for the multiplier": lambda m: setattr(m, "scale", torch.tensor(3.0)),
    "another drop": lambda m: setattr(m, "drop", nn.Hardtanh(-0.1, 0.1)),
    "forward of the block": overwrite_forward,
    "the norm": lambda m: setattr(m, "norm", nn.Identity()),
}


@pytest.mark.parametrize("name", LATER)
def test_a_change_to_a_block_takes_effect(name: str) -> None:
    old, new = pair("gated")
    x = rows()
    before = old(x)
    for model in (old, new):
        LATER[name](model)
    assert_same(outcome(new, x), outcome(old, x))
    assert not torch.equal(old(x), before)


def test_another_activation_function_takes_effect() -> None:
    old, new = pair("plain")
    old.act = new.act = torch.tanh
    assert_same(outcome(new, rows()), outcome(old, rows()))
    old.act = new.act = functools.partial(F.gelu, approximate="tanh")
    assert_same(outcome(new, rows()), outcome(old, rows()))


def test_attributes_of_an_activation_take_effect() -> None:
    model = nn.Sequential(nn.Linear(6, 10), nn.LeakyReLU(), nn.Linear(10, 6)).double()
    swapped(model)
    model[1].negative_slope = 0.5
    assert_same({"y": model(rows())}, {"y": model[2](model[1](model[0](rows())))})


def test_layers_of_a_sequential_can_be_added_and_removed() -> None:
    old, new = pair("sequential")
    x = rows()
    for edit in (
        lambda m: m.append(nn.Tanh()),
        lambda m: m.insert(0, nn.Tanh()),
        lambda m: m.__delitem__(2),
        lambda m: m.__setitem__(2, nn.ReLU()),
    ):
        edit(old)
        edit(new)
        assert_same(outcome(new, x), outcome(old, x))
    new = swapped(sequential())
    assert_same({"y": new[:2](x)}, {"y": new[1](new[0](x))})
    assert len(new) == 4
    assert new[-1] is new._modules["3"]


def test_a_class_patched_later_takes_effect(monkeypatch) -> None:
    model, x = swapped(Plain()), rows()
    monkeypatch.setattr(Plain, "forward", lambda self, x: x + 1)
    assert torch.equal(model(x), x + 1)
    monkeypatch.undo()
    assert not torch.equal(model(x), x + 1)


def test_a_class_with_a_patched_forward_is_left_alone(monkeypatch) -> None:
    old = Plain.forward

    @functools.wraps(old)
    def patched(self, x):
        return 2 * old(self, x)

    monkeypatch.setattr(Plain, "forward", patched)
    model, x = Plain(), rows()
    expected = model(x)
    assert ffn.swap(model).swapped == []
    assert torch.equal(model(x), expected)


@pytest.mark.usefixtures("nothing_compiled")
@kinds
def test_compiled_code_follows_a_later_change(kind: str) -> None:
    old, new = pair(kind)
    x, child = rows(), LINEARS[kind][-1]
    compiled = torch.compile(new, backend="eager")
    compiled(x)
    for model in (old, new):
        change("wrapped", model, child)
    assert_same({"y": compiled(x)}, {"y": old(x)})
