"""reroute: whatever is done to a block later takes effect; copies, compilers and transforms see a block."""

import copy
import functools
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

import ffn
from ffn.interop.reroute import Rerouted
from tests.interop.blocks import (
    KINDS,
    LINEARS,
    Gated,
    Plain,
    kinds,
    pair,
    rows,
    runs_old,
    sequential,
    swapped,
)
from tests.interop.same import F64, assert_same, outcome

# Dynamo of torch 2.13 instantiates autograd contexts; jit, quantization and pruning are announced as leaving.
pytestmark = [
    pytest.mark.filterwarnings(r"ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings(r"ignore:.*torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings(r"ignore:.*torch.ao.quantization:DeprecationWarning"),
    pytest.mark.filterwarnings(r"ignore:torch.quantize_per_tensor:UserWarning"),
]


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
def test_what_is_done_to_a_product_takes_effect(kind: str, child: str, name: str) -> None:
    old, new = pair(kind)
    x = rows()
    before = outcome(old, x)
    for model in (old, new):
        torch.manual_seed(3)
        change(name, model, child)
    expected = outcome(old, x)
    assert_same(outcome(new, x), expected)
    same = [a.shape == b.shape and torch.equal(a, b) for a, b in zip(before.values(), expected.values())]  # noqa: B905
    assert not all(same), "the change should show"
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
def test_what_is_done_to_a_block_takes_effect(name: str) -> None:
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


def test_attributes_within_an_activation_take_effect() -> None:
    model = nn.Sequential(nn.Linear(6, 10), nn.LeakyReLU(), nn.Linear(10, 6)).double()
    swapped(model)
    model[1].negative_slope = 0.5
    assert_same({"y": model(rows())}, {"y": model[2](model[1](model[0](rows())))})


def test_steps_of_a_sequential_can_come_and_go() -> None:
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


@kinds
def test_dropout_follows_its_probability_and_mode(kind: str) -> None:
    old, new = pair(kind, 0.5)
    x = rows()
    assert_same(outcome(new.eval(), x), outcome(old.eval(), x))
    new.train()
    first, again, other = outcome(new, x, 1), outcome(new, x, 1), outcome(new, x, 2)
    assert_same(again, first)
    assert not torch.equal(first["y"], other["y"])
    holder, name = (
        (new, "p") if kind == "plain" else (new.get_submodule("drop" if kind == "gated" else "2"), "p")
    )
    setattr(holder, name, 0.0)
    assert_same(outcome(new, x), outcome(old.eval(), x))
    assert not runs_old(new)
    setattr(holder, name, 1.0)
    assert torch.equal(new(x), new(x)), "all is dropped"
    assert runs_old(new)
    if kind != "plain":
        setattr(holder, name, 0.5)
        holder.eval()
        assert_same(outcome(new, x), outcome(old.eval(), x))


@kinds
def test_dropout_has_the_statistics_of_the_original(kind: str) -> None:
    old, new = pair(kind, 0.3)
    x = rows()[:1, :1].expand(4000, 1, 6).contiguous()
    means, variances = [], []
    with torch.no_grad():
        for model in (old, new):
            y = model(x)[:, 0]
            means.append(y.mean(0))
            variances.append(y.var(0))
    error = 5 * (variances[0] / 4000).sqrt() * 2**0.5
    assert ((means[0] - means[1]).abs() < error).all()
    assert (variances[0] / variances[1] - 1).abs().max() < 0.25


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


def test_a_class_patched_later_takes_effect(monkeypatch) -> None:
    model, x = swapped(Plain()), rows()
    monkeypatch.setattr(Plain, "forward", lambda self, x: x + 1)
    assert torch.equal(model(x), x + 1)
    monkeypatch.undo()
    assert not torch.equal(model(x), x + 1)


def test_a_class_patched_before_is_left_where_the_patch_calls_the_old(monkeypatch) -> None:
    old = Plain.forward

    @functools.wraps(old)
    def patched(self, x):
        return 2 * old(self, x)

    monkeypatch.setattr(Plain, "forward", patched)
    model, x = Plain(), rows()
    expected = model(x)
    assert ffn.swap(model).swapped == []
    assert torch.equal(model(x), expected)


# --- copies


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
def test_copies_are_swapped_too_and_their_own(kind: str, name: str) -> None:
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


def test_state_dicts_go_both_ways() -> None:
    old, new = Gated(), swapped(Gated())
    assert list(vars(new.state_dict())) == list(vars(old.state_dict()))
    new.load_state_dict(old.state_dict())
    assert_same(outcome(new, rows()), outcome(old, rows()))
    old.load_state_dict(swapped(Gated()).state_dict())
    assert_same({"y": torch.func.functional_call(new, old.state_dict(), rows())}, {"y": old(rows())})


class Reduced(Plain):
    def __reduce__(self):
        return Reduced, (), self.__dict__


def test_classes_that_copy_themselves_are_left_and_ones_made_anew_work() -> None:
    report = ffn.swap(Reduced())
    assert report[0].reason == "Reduced is copied and pickled in a way of its own"
    model = swapped(Plain())
    again = type(model)().double()
    again.load_state_dict(model.state_dict())
    assert_same(outcome(again, rows()), outcome(model, rows()))


# --- tracers, compilers, transforms


@kinds
def test_compile_export_trace_and_transforms_see_the_block(kind: str) -> None:
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


@kinds
def test_compiled_code_follows_a_later_change(kind: str) -> None:
    old, new = pair(kind)
    x, child = rows(), LINEARS[kind][-1]
    compiled = torch.compile(new, backend="eager")
    compiled(x)
    for model in (old, new):
        change("wrapped", model, child)
    assert_same({"y": compiled(x)}, {"y": old(x)})


def test_a_model_compiled_before_is_swapped_within() -> None:
    old = Gated()
    compiled, x = torch.compile(copy.deepcopy(old), backend="eager"), rows()
    compiled(x)
    assert len(ffn.swap(compiled).swapped) == 1
    assert_same({"y": compiled(x)}, {"y": old(x)})


@pytest.mark.parametrize("reentrant", [False, True])
@kinds
def test_checkpointing_repeats_the_same_dropout(kind: str, reentrant: bool) -> None:
    model, x = swapped(KINDS[kind](0.4)), rows()
    expected = outcome(model, x, 5)

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=reentrant)

    found = Checkpointed()
    x = x.requires_grad_()
    torch.manual_seed(5)
    y = found(x)
    (y * torch.linspace(0.5, 1.5, y.numel(), dtype=F64).view_as(y)).sum().backward()
    grads = {"y": y.detach(), "x": x.grad, **{n: p.grad for n, p in model.named_parameters()}}
    assert_same(grads, expected)


@kinds
def test_training_goes_on_through_swap_and_unswap(kind: str) -> None:
    old = KINDS[kind]()
    new = copy.deepcopy(old)
    optimizers = [torch.optim.AdamW(m.parameters(), 0.01) for m in (old, new)]
    x = rows()

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
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
