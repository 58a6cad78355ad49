"""Packed forwards: copies follow the weights, and the class's own forward runs where copies cannot serve."""

import copy

import pytest
import torch
from torch import nn

from ffn import FeedForward, pack, unpack
from ffn.nn.attention import Attention
from ffn.ops import hardware
from ffn.packing import pack as packing
from tests.nn.test_children import CHANGES
from tests.packing.blocks import ACTIVATIONS, FORMS, assert_same, build

pytestmark = pytest.mark.usefixtures("small_is_worth_it")


@ACTIVATIONS
def test_gradients_are_those_of_the_plain_block(activation: str) -> None:
    block, plain, x = build(activation)
    assert_same(block, plain, x)
    assert block.explain(x).startswith("eager: ")
    y = block(x)
    assert torch.equal(y, plain(x))
    grads = torch.autograd.grad(y.square().sum(), list(block.parameters()))
    theirs = torch.autograd.grad(plain(x).square().sum(), list(plain.parameters()))
    assert all(map(torch.equal, grads, theirs))


@pytest.mark.parametrize("options", [{}, {"foreach": False}, {"foreach": True}], ids=str)
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@FORMS
def test_an_optimizer_step_is_seen(optimizer, options: dict, form: str) -> None:
    block, plain, x = build(form=form)
    step = optimizer(block.parameters(), lr=0.1, **options)
    block(x).square().sum().backward()
    for _ in range(3):
        assert_same(block, plain, x)
        step.step()
    assert_same(block, plain, x)


@FORMS
def test_changed_and_replaced_weights_are_seen(form: str) -> None:
    block, plain, x = build(form=form)
    assert_same(block, plain, x)
    block.load_state_dict(FeedForward(64, 96, activation="swiglu").state_dict())
    assert_same(block, plain, x)
    block.load_state_dict(FeedForward(64, 96, activation="swiglu").state_dict(), assign=True)
    assert_same(block, plain, x)
    block.up_proj.weight = nn.Parameter(torch.randn(96, 64))
    assert_same(block, plain, x)
    block.up_proj.weight.data = torch.randn(96, 64)
    assert_same(block, plain, x)
    with torch.no_grad():
        block.down_proj.weight.copy_(torch.randn(64, 96))
    assert_same(block, plain, x)
    block.gate_proj = nn.Linear(64, 96)
    assert_same(block, plain, x)
    block.reset_parameters()
    assert_same(block, plain, x)


@FORMS
def test_pack_again_sees_a_write_that_torch_does_not_count(form: str) -> None:
    block, plain, x = build(form=form)
    block.down_proj.weight.data.mul_(2.0)
    assert_same(pack(block, form), plain, x)


def test_global_hooks_fire() -> None:
    block, _, x = build()
    seen: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    with torch.no_grad():
        block(x)
    handle.remove()
    assert block.up_proj in seen


@FORMS
def test_a_move_or_cast_is_seen(form: str) -> None:
    block, plain, x = build(form=form)
    assert_same(block, plain, x)
    if hardware.packs(torch.bfloat16):
        assert_same(block.bfloat16(), plain.bfloat16(), x.bfloat16())
    assert_same(block.float(), plain.float(), x)
    with torch.no_grad():
        assert torch.equal(block.double()(x.double()), plain.double()(x.double()))
        assert block.forward.__self__.packed is None
        assert block.to("meta")(x.double().to("meta")).is_meta
        with pytest.raises(ValueError, match="device"):
            block(x.double())


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("child", ["gate_proj", "up_proj", "down_proj"])
def test_a_changed_child_takes_effect(change, child: str) -> None:
    block, _, x = build(dtype=torch.float32)
    with torch.no_grad():
        before = block(x)
        if change.__name__ in ("wrap", "subclass"):  # which make children in float64
            block, x = block.double(), x.double()
        change(block, child)
        assert block.explain(x).startswith("children: ")
        y = block(x)
        assert not torch.allclose(y, before.to(y.dtype))
        unpack(block)
        torch.testing.assert_close(y, block(x))


@FORMS
def test_dropout_and_a_named_backend_take_effect(form: str) -> None:
    block, plain, x = build(dropout=0.5, out_dropout=0.1, form=form)
    with torch.no_grad():
        assert block.explain(x).startswith("eager: ")
        assert not torch.equal(block(x), block(x))
    assert_same(block.eval(), plain.eval(), x)
    block.backend = "reference"
    with torch.no_grad():
        assert block.explain(x).startswith("reference: ")


@FORMS
def test_chunks_change_nothing(form: str) -> None:
    block, plain, x = build(save="input", chunk_tokens=4, form=form)
    assert_same(block, plain, x)
    assert_same(block, plain, x[:, :1])


def test_misfits_raise_the_errors_of_the_class() -> None:
    block, _, x = build()
    with torch.no_grad():
        with pytest.raises(ValueError, match=r"^x must be "):
            block(x[..., :7])
        with pytest.raises(TypeError, match="dtype"):
            block(x.double())
        block.up_proj.bias.data = torch.zeros(3)
        with pytest.raises(ValueError, match="up_bias"):
            block(x)


@FORMS
def test_another_activation_takes_effect(form: str) -> None:
    block, plain, x = build("gelu", form=form)
    assert_same(block, plain, x)
    block.activation = plain.activation = "relu2"
    assert_same(block, plain, x)
    block.activation = "swiglu"
    with torch.no_grad(), pytest.raises(ValueError, match="gate"):
        block(x)


def test_strided_inputs_and_biases_change_nothing() -> None:
    block, plain, x = build()
    assert_same(block, plain, torch.randn(64, 7).t())
    assert_same(block, plain, x.transpose(0, 1))
    assert_same(block, plain, x[:, :1].expand(3, 4, 64))
    block.up_proj.bias.data = torch.randn(192)[::2]
    plain.load_state_dict(block.state_dict())
    with torch.no_grad():
        assert block.explain(x).startswith("eager: ")
        torch.testing.assert_close(block(x), plain(x))


# torch warns about its own code here, as in tests/nn/test_transforms.py.
@pytest.mark.filterwarnings(r"ignore:`torch\.jit\.\w+` is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings(r"ignore:.*should not be instantiated:DeprecationWarning")
def test_autocast_and_transforms_run_the_class() -> None:
    block, plain, x = build()
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(block(x), plain(x))
        torch.testing.assert_close(torch.vmap(block)(x), torch.vmap(plain)(x))
        y, dy = torch.func.jvp(block, (x,), (x,))
        torch.testing.assert_close((y, dy), torch.func.jvp(plain, (x,), (x,)))


def test_packed_blocks_compile_and_export() -> None:
    block, plain, x = build()
    with torch.no_grad():
        compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), plain(x))
        exported = torch.export.export(block, (x,)).module()
        torch.testing.assert_close(exported(x), plain(x))
    assert set(torch.export.export(block, (x,)).state_dict) == set(plain.state_dict())


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@FORMS
def test_a_changed_projection_takes_effect(change, form: str) -> None:
    attention = pack(Attention(8, 2, qkv_bias=True, dtype=torch.float32), form)
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        before = attention(x)
        if change.__name__ in ("wrap", "subclass"):  # which make children in float64
            attention, x = attention.double(), x.double()
        change(attention, "k_proj")
        y = attention(x)
        assert not torch.allclose(y, before.to(y.dtype))
        unpack(attention)
        torch.testing.assert_close(y, attention(x), atol=0.02, rtol=0.02)


@FORMS
def test_projections_with_unequal_biases_are_packed_one_by_one(form: str) -> None:
    attention, x = Attention(8, 2, dtype=torch.float32, qkv_bias=True), torch.randn(2, 3, 8)
    pack(attention, form)
    close = {"atol": 0.05, "rtol": 0.05} if form == "int8" else {}
    with torch.no_grad():
        for weight in ("q_proj", "v_proj"):
            torch.testing.assert_close(attention(x), unpack(copy.deepcopy(attention))(x), **close)
            getattr(attention, weight).bias = None
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(attention(x), unpack(copy.deepcopy(attention))(x))
    unpack(attention)
    assert packing.is_packed(pack(attention, form).q_proj)


def test_a_single_linear() -> None:
    linear, x = pack(nn.Linear(8, 6)), torch.randn(2, 8)
    plain = unpack(copy.deepcopy(linear))
    with torch.no_grad():
        torch.testing.assert_close(linear(x), plain(x))
        assert linear.forward.__self__.packed is not None
        torch.testing.assert_close(linear(input=x), plain(x))
        torch.testing.assert_close(linear(x.to_sparse()), plain(x))
        linear.weight.zero_()
        torch.testing.assert_close(linear(x), linear.bias.expand(2, 6))
        torch.nn.utils.parametrize.register_parametrization(linear, "weight", nn.Tanh())
        torch.testing.assert_close(linear(x), linear.bias.expand(2, 6))
    assert linear(x).requires_grad


def test_a_patched_class_takes_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = pack(nn.Linear(8, 6))
    monkeypatch.setattr(nn.Linear, "forward", lambda self, input: input.sum())
    with torch.no_grad():
        assert linear(torch.ones(2, 8)) == 16
