"""swap and unswap: blocks are found, rerouted and restored in models of many shapes."""

import copy
import doctest

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import ffn
from ffn.interop.swap import in_place
from ffn.interop.swap.reroute import Rerouted
from tests.interop.swap.blocks import KINDS, TORCHS_OWN, Gated, Plain, kinds, pair, rows, swapped
from tests.interop.swap.same import assert_same, kept, outcome

pytestmark = TORCHS_OWN


@kinds
def test_outputs_and_gradients_are_equal_and_less_is_saved(kind: str) -> None:
    old, new = pair(kind)
    for x in (rows(), rows()[0], rows()[0, 0], rows()[:0], rows().transpose(0, 1)):
        if x.numel():
            assert_same(outcome(new, x), outcome(old, x))
        else:
            assert new(x).shape == x.shape
    assert sum(kept(new, rows()).values()) < sum(kept(old, rows()).values())
    with torch.no_grad():
        assert_same({"y": new(rows())}, {"y": old(rows())})


@kinds
def test_repr_class_name_and_state_dict_stay_the_same(kind: str) -> None:
    old, new = pair(kind)
    assert repr(new) == repr(old)
    assert isinstance(new, type(old))
    assert type(new).__name__ == type(old).__name__
    assert type(new).__module__ == type(old).__module__
    assert list(new.state_dict()) == list(old.state_dict())
    assert [n for n, _ in new.named_modules()] == [n for n, _ in old.named_modules()]
    assert type(new).forward.__doc__ == type(old).forward.__doc__


@kinds
def test_unswap_leaves_no_trace(kind: str) -> None:
    model = nn.ModuleDict({"a": KINDS[kind](), "b": nn.ModuleList([KINDS[kind]()])})
    before = [(type(m), copy.copy(vars(m)), repr(m)) for m in model.modules()]
    assert len(ffn.swap(model).swapped) == 2
    assert ffn.unswap(model) == 2
    for m, (cls, attributes, text) in zip(model.modules(), before, strict=True):
        assert type(m) is cls
        assert list(vars(m)) == list(attributes)
        assert all(vars(m)[name] is value for name, value in attributes.items())
        assert repr(m) == text
    assert ffn.unswap(model) == 0


@kinds
def test_a_dry_run_changes_nothing_and_reports_the_same(kind: str) -> None:
    model = KINDS[kind]()
    report = ffn.swap(model, dry_run=True)
    assert type(model) is type(KINDS[kind]())
    assert "_ffn_plan" not in vars(model)
    assert str(ffn.swap(model)) == str(report)


@kinds
def test_swap_keeps_random_state_modes_and_gradients(kind: str) -> None:
    model = KINDS[kind](0.5).train()
    first = next(model.parameters())
    first.grad = torch.ones_like(first)
    state = torch.get_rng_state()
    swapped(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(m.training for m in model.modules())
    assert torch.equal(first.grad, torch.ones_like(first))
    assert sum(p.grad is not None for p in model.parameters()) == 1


def test_a_swapped_block_is_not_swapped_again() -> None:
    model = swapped(Plain())
    cls = type(model)
    report = ffn.swap(model)
    assert [(b.action, b.reason) for b in report] == [("left", "already swapped")]
    (block,) = ffn.swap(model, save="input")
    assert "other options" in block.reason
    assert type(model) is cls
    assert ffn.unswap(model) == 1


def test_numbers_decide_and_not_the_name_of_the_activation() -> None:
    class Lying(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2, self.gelu = nn.Linear(6, 10), nn.Linear(10, 6), nn.GELU(approximate="tanh")
            self.hidden_act = "gelu"

        def forward(self, x):
            return self.fc2(self.gelu(self.fc1(x)))

    assert ffn.swap(Lying().double())[0].what == "gelu_tanh"


def test_a_shared_block_is_swapped_once() -> None:
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = Plain()
            self.b = self.a

        def forward(self, x):
            return self.b(self.a(x))

    old = Twice()
    new = copy.deepcopy(old)
    report = ffn.swap(new)
    assert [block.path for block in report] == ["a"]
    assert new.a is new.b
    assert_same(outcome(new, rows()), outcome(old, rows()))
    assert ffn.unswap(new) == 1


def test_models_without_blocks_or_weights_are_left_alone() -> None:
    for model in (nn.Module(), nn.Linear(3, 4), nn.Sequential(), nn.LayerNorm(3), nn.ModuleList()):
        assert len(ffn.swap(model)) == 0
        assert str(ffn.swap(model)).endswith("0 of 0 blocks swapped")
        assert ffn.unswap(model) == 0
    meta = Plain().to("meta")
    assert ffn.swap(meta)[0].reason == "its weights are on the meta device: load them first"
    assert type(meta) is Plain


def test_a_default_device_does_not_matter() -> None:
    model = Plain()
    with torch.device("meta"):
        assert len(ffn.swap(model).swapped) == 1


def test_scripted_and_traced_modules_are_left_alone() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.Linear(6, 10), nn.GELU(), nn.Linear(10, 6)))
    assert ffn.swap(nn.ModuleList([scripted])).swapped == []
    traced = torch.fx.symbolic_trace(Plain().eval())
    assert ffn.swap(traced).swapped == []
    assert traced(rows()).shape == (2, 3, 6)


def test_attention_and_experts_are_not_swapped() -> None:
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.randn(2, 20, 6))

    class SelfAttention(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(6, 10), nn.Linear(10, 6)

        def forward(self, x):
            return self.fc2(F.gelu(self.fc1(x)))

    report = ffn.swap(nn.ModuleDict({"experts": Experts(), "attention": SelfAttention()}))
    assert [(b.path, b.reason) for b in report] == [("experts", "a mixture of experts")]
    report = ffn.swap(nn.ModuleDict({"experts": nn.ModuleList([Plain()])}))
    assert [(b.path, b.action) for b in report] == [("experts.0", "left")]


@pytest.mark.parametrize(("save", "chunk"), [("preact", None), ("input", None), ("input", 2)])
def test_options_are_passed_to_the_op(save: str, chunk: int | None) -> None:
    old = Gated(0.0)
    new = copy.deepcopy(old)
    (block,) = ffn.swap(new, save=save, chunk_tokens=chunk).swapped
    assert block.after == 8 * (6 + (20 if save == "preact" else 0))
    assert block.before > block.after
    assert_same(outcome(new, rows()), outcome(old, rows()))


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"save": "all"}, "save"),
        ({"chunk_tokens": 4}, "chunk_tokens"),
        ({"backend": "cuda"}, "backend"),
    ],
)
def test_an_invalid_option_raises_and_changes_nothing(options: dict, argument: str) -> None:
    model = nn.ModuleList([Plain(), Gated()])
    with pytest.raises(ValueError, match=argument):
        ffn.swap(model, **options)
    assert [type(m) for m in model] == [Plain, Gated]


@pytest.mark.parametrize("given", [None, torch.zeros(3)])
def test_a_model_that_is_no_module_raises(given) -> None:
    with pytest.raises(TypeError, match="model"):
        ffn.swap(given)


def test_unswap_is_all_or_nothing() -> None:
    model = nn.ModuleList([swapped(Plain()), swapped(Gated())])
    cls = type(model[1])
    model[1].__class__ = type("Sharded", (cls,), {})
    with pytest.raises(RuntimeError, match="Sharded"):
        ffn.unswap(model)
    assert isinstance(model[0], Rerouted)
    model[1].__class__ = cls
    assert ffn.unswap(model) == 2


def test_docstrings() -> None:
    assert doctest.testmod(in_place, extraglobs={"nn": nn}).failed == 0
