"""Packed forwards: the same numbers from copies that follow the weights; aside wherever they will not do."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from ffn import FeedForward, pack, unpack
from ffn.nn.attention import Attention
from ffn.ops import dispatch
from ffn.packing import pack as packing
from ffn.packing.float_copies import Packed
from ffn.packing.forwards import one_look
from tests.nn.test_children import CHANGES
from tests.packing.blocks import ACTIVATIONS, FORMS, build, same

pytestmark = pytest.mark.usefixtures("small_is_worth_it")


@ACTIVATIONS
def test_gradients_are_those_of_the_plain_block(activation: str) -> None:
    block, plain, x = build(activation)
    same(block, plain, x)
    assert block.explain(x).startswith("eager: ")
    y = block(x)
    assert torch.equal(y, plain(x))
    grads = torch.autograd.grad(y.square().sum(), list(block.parameters()))
    theirs = torch.autograd.grad(plain(x).square().sum(), list(plain.parameters()))
    assert all(map(torch.equal, grads, theirs))


@pytest.mark.parametrize("options", [{"fused": True}, {"fused": False}, {"foreach": True}])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@FORMS
def test_optimizers_are_followed(optimizer, options: dict, form: str) -> None:
    block, plain, x = build(form=form)
    step = optimizer(block.parameters(), lr=0.1, **options)
    block(x).square().sum().backward()
    for _ in range(3):
        same(block, plain, x)
        step.step()
    same(block, plain, x)


def test_a_fused_step_counts_what_it_has_written_alone() -> None:
    same(*build())
    linear = nn.Linear(4, 4)
    linear.weight.grad = torch.ones(4, 4)
    versions = linear.weight._version, linear.bias._version
    torch.optim.SGD(linear.parameters(), fused=True).step()
    assert linear.weight._version > versions[0]
    assert linear.bias._version == versions[1]


@FORMS
def test_other_changes_are_followed(form: str) -> None:
    block, plain, x = build(form=form)
    same(block, plain, x)
    block.load_state_dict(FeedForward(64, 96, activation="swiglu").state_dict())
    same(block, plain, x)
    block.load_state_dict(FeedForward(64, 96, activation="swiglu").state_dict(), assign=True)
    same(block, plain, x)
    block.up_proj.weight.data = torch.randn(96, 64)
    same(block, plain, x)
    block.down_proj.weight.data.copy_(torch.randn(64, 96))
    same(block, plain, x)
    block.gate_proj = nn.Linear(64, 96)
    same(block, plain, x)
    block.up_proj.bias.data.mul_(2.0)
    block.reset_parameters()
    same(block, plain, x)


@FORMS
def test_dtype_and_device_are_followed(form: str) -> None:
    block, plain, x = build(form=form)
    same(block, plain, x)
    if dispatch.packs(torch.bfloat16):
        same(block.bfloat16(), plain.bfloat16(), x.bfloat16())
    same(block.float(), plain.float(), x)
    with torch.no_grad():
        assert torch.equal(block.double()(x.double()), plain.double()(x.double()))
        assert block.forward.__self__.packed is None
        assert block.to("meta")(x.double().to("meta")).is_meta
        with pytest.raises(ValueError, match="wants one device"):
            block(x.double())


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("child", ["gate_proj", "up_proj", "down_proj"])
def test_whatever_is_done_to_a_child_takes_effect(change, child: str) -> None:
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
def test_dropout_and_the_named_backend_stay(form: str) -> None:
    block, plain, x = build(dropout=0.5, out_dropout=0.1, form=form)
    with torch.no_grad():
        assert block.explain(x).startswith("eager: ")
        assert not torch.equal(block(x), block(x))
    same(block.eval(), plain.eval(), x)
    block.backend = "reference"
    with torch.no_grad():
        assert block.explain(x).startswith("reference: ")


@FORMS
def test_tokens_in_chunks(form: str) -> None:
    block, plain, x = build(save="input", chunk_tokens=4, form=form)
    same(block, plain, x)
    same(block, plain, x[:, :1])


def test_inputs_that_do_not_fit_are_refused_as_ever() -> None:
    block, _, x = build()
    with torch.no_grad():
        with pytest.raises(ValueError, match=r"wants x \(\.\.\., 64\)"):
            block(x[..., :7])
        with pytest.raises(TypeError, match="one floating dtype"):
            block(x.double())
        block.up_proj.bias.data = torch.zeros(3)
        with pytest.raises(ValueError, match=r"up_bias \(96\)"):
            block(x)


@FORMS
def test_another_activation_is_followed(form: str) -> None:
    block, plain, x = build("gelu", form=form)
    same(block, plain, x)
    block.activation = plain.activation = "relu2"
    same(block, plain, x)
    block.activation = "swiglu"
    with torch.no_grad(), pytest.raises(ValueError, match="gate"):
        block(x)


def test_strided_inputs_and_biases() -> None:
    block, plain, x = build()
    same(block, plain, torch.randn(64, 7).t())
    same(block, plain, x.transpose(0, 1))
    same(block, plain, x[:, :1].expand(3, 4, 64))
    block.up_proj.bias.data = torch.randn(192)[::2]
    plain.load_state_dict(block.state_dict())
    with torch.no_grad():
        assert block.explain(x).startswith("eager: ")
        torch.testing.assert_close(block(x), plain(x))


# Warnings of torch about itself, as in tests/nn/test_transforms.py.
@pytest.mark.filterwarnings(r"ignore:`torch\.jit\.\w+` is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings(r"ignore:.*should not be instantiated:DeprecationWarning")
def test_autocast_and_transforms() -> None:
    block, plain, x = build()
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(block(x), plain(x))
        torch.testing.assert_close(torch.vmap(block)(x), torch.vmap(plain)(x))
        y, dy = torch.func.jvp(block, (x,), (x,))
        torch.testing.assert_close((y, dy), torch.func.jvp(plain, (x,), (x,)))


def test_compiles_and_exports() -> None:
    block, plain, x = build()
    with torch.no_grad():
        compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), plain(x))
        exported = torch.export.export(block, (x,)).module()
        torch.testing.assert_close(exported(x), plain(x))
    assert set(torch.export.export(block, (x,)).state_dict) == set(plain.state_dict())


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@FORMS
def test_whatever_is_done_to_a_projection_takes_effect(change, form: str) -> None:
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
def test_attention_that_is_not_uniform(form: str) -> None:
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


def test_a_linear_alone() -> None:
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


def test_a_patch_of_the_class_takes_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = pack(nn.Linear(8, 6))
    monkeypatch.setattr(nn.Linear, "forward", lambda self, input: input.sum())
    with torch.no_grad():
        assert linear(torch.ones(2, 8)) == 16


@FORMS
def test_one_look_is_enough(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    looks, are_of = [], Packed.are_of
    monkeypatch.setattr(Packed, "are_of", lambda *given: looks.append(1) or are_of(*given))
    block, plain, x = build(form=form)
    with one_look(block):
        same(block, plain, x)
        looks.clear()
        y = [block(x) for _ in range(3)]
        with torch.no_grad():
            y += [block(x) for _ in range(3)]
            assert not looks
            with one_look(block):
                assert torch.equal(block(x), y[-1])
                assert len(looks) == 1
            assert torch.equal(block(x), y[-1])
            assert len(looks) == 2  # another's, so that it is looked at again
    assert all(torch.equal(z, plain(x)) for z in y[:3])  # gradients were wanted
    block.up_proj.weight.data.mul_(2.0)
    same(block, plain, x)
    with one_look(block):
        same(block, plain, x)
        with torch.no_grad(), pytest.raises(ValueError, match="wants x"):
            block(x[..., :3])


def test_one_look_is_of_one_thread() -> None:
    block, plain, x = build()
    with one_look(block), ThreadPoolExecutor(1) as other:
        same(block, plain, x)
        other.submit(torch.nn.init.zeros_, block.down_proj.weight).result()
        other.submit(torch.nn.init.ones_, block.down_proj.bias).result()

        def theirs():
            with torch.no_grad():
                return block(x)

        assert torch.equal(other.submit(theirs).result(), torch.ones(3, 5, 64))


def test_one_look_is_of_one_model() -> None:
    """Another's, called in between, is looked at each time."""
    block, plain, x = build()
    with one_look(nn.Linear(2, 2)):
        same(block, plain, x)
        block.up_proj.weight.data.mul_(2.0)
        same(block, plain, x)
