"""Packing: the same numbers from copies that follow the weights, and aside wherever they will not do."""

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn

import ffn
from ffn import FeedForward, Transformer, TransformerConfig, pack, packing, unpack
from ffn.nn.head import Head
from ffn.ops import dispatch
from tests.nn.test_children import CHANGES

FORMS = pytest.mark.parametrize("activation", ["gelu", "relu2", "swiglu"])


@pytest.fixture(autouse=True)
def _small_is_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    if not dispatch.packs(torch.float32):
        pytest.skip("oneDNN packs nothing in this build of torch")
    monkeypatch.setattr(packing, "WORTH_PACKING", 0)


def build(activation: str = "swiglu", **options) -> tuple[FeedForward, FeedForward, Tensor]:
    """A packed block, the same block unpacked, and tokens."""
    plain = FeedForward(64, 96, activation=activation, **options)
    return pack(copy.deepcopy(plain)), plain, torch.randn(3, 5, 64)


def same(block: FeedForward, plain: FeedForward, x: Tensor) -> None:
    """The block runs packed, and gives what the plain one with its weights gives."""
    plain.load_state_dict(block.state_dict())
    with torch.no_grad():
        assert block.explain(x).startswith("packed: ")
        loose = {"atol": 1e-2, "rtol": 2e-2} if x.dtype == torch.bfloat16 else {}
        torch.testing.assert_close(block(x), plain(x), **loose)


@FORMS
def test_packs_and_unpacks(activation: str) -> None:
    block, plain, x = build(activation)
    same(block, plain, x)
    with torch.inference_mode():
        torch.testing.assert_close(block(x), plain(x))
    assert block.state_dict().keys() == plain.state_dict().keys()
    assert pack(block) is block
    assert unpack(block) is block
    assert "forward" not in block.__dict__
    with torch.no_grad():
        assert not block.explain(x).startswith("packed: ")
    assert unpack(block) is block


@FORMS
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
def test_optimizers_are_followed(optimizer, options: dict) -> None:
    block, plain, x = build()
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


def test_other_changes_are_followed() -> None:
    block, plain, x = build()
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


def test_dtype_and_device_are_followed() -> None:
    block, plain, x = build()
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


def test_dropout_and_the_named_backend_stay() -> None:
    block, plain, x = build(dropout=0.5, out_dropout=0.1)
    with torch.no_grad():
        assert block.explain(x).startswith("eager: ")
        assert not torch.equal(block(x), block(x))
    same(block.eval(), plain.eval(), x)
    block.backend = "reference"
    with torch.no_grad():
        assert block.explain(x).startswith("reference: ")


def test_tokens_in_chunks() -> None:
    block, plain, x = build(save="input", chunk_tokens=4)
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


def test_another_activation_is_followed() -> None:
    block, plain, x = build("gelu")
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


def test_copies_and_pickles_make_their_own() -> None:
    block, plain, x = build()
    same(block, plain, x)
    file = io.BytesIO()
    torch.save(block, file)
    size = len(pickle.dumps(block))
    assert size < len(pickle.dumps(plain)) + 1000
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block)), loaded):
        assert other.forward.__self__.module is other
        assert other.forward.__self__.packed is None
        with torch.no_grad():
            other.down_proj.weight.zero_()
            other.down_proj.bias.zero_()
            assert torch.equal(other(x), torch.zeros_like(x))
        same(block, plain, x)
    assert not packing.is_packed(unpack(copy.deepcopy(block)))


def test_compiles_and_exports() -> None:
    block, plain, x = build()
    with torch.no_grad():
        compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), plain(x))
        exported = torch.export.export(block, (x,)).module()
        torch.testing.assert_close(exported(x), plain(x))
    assert set(torch.export.export(block, (x,)).state_dict) == set(plain.state_dict())


def test_a_whole_model() -> None:
    config = TransformerConfig(vocab_size=50, dim=32, num_layers=2, num_heads=2, max_seq_len=16)
    model = Transformer(config).eval()
    tokens = torch.randint(50, (2, 9))
    with torch.no_grad():
        want = model(tokens)
        pack(model)
        packed = [type(module) for module in model.modules() if packing.is_packed(module)]
        assert packed.count(FeedForward) == 2
        assert packed.count(nn.Linear) == 8
        assert packed.count(Head) == 1
        assert len(packed) == 11
        torch.testing.assert_close(model(tokens), want)
        model.embedding.weight.mul_(2.0)
        changed = model(tokens)
    row = ffn.generate(model, [[1, 2, 3]], 5, temperature=0.0)
    assert packing.is_packed(model.head)
    unpack(model)
    assert not any(map(packing.is_packed, model.modules()))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), changed)
    assert ffn.generate(model, [[1, 2, 3]], 5, temperature=0.0) == row
    assert not any(map(packing.is_packed, model.modules()))


def test_a_linear_alone() -> None:
    linear, x = pack(nn.Linear(8, 6)), torch.randn(2, 8)
    plain = unpack(copy.deepcopy(linear))
    with torch.no_grad():
        torch.testing.assert_close(linear(x), plain(x))
        assert linear.forward.__self__.packed is not None
        linear.weight.zero_()
        torch.testing.assert_close(linear(x), linear.bias.expand(2, 6))
        torch.nn.utils.parametrize.register_parametrization(linear, "weight", nn.Tanh())
        torch.testing.assert_close(linear(x), linear.bias.expand(2, 6))
    assert linear(x).requires_grad


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ValueError, match=r"^pack\(Sequential\): 0.gate_proj.weight is float16 on cpu; oneDNN"
    ):
        pack(nn.Sequential(FeedForward(8, activation="swiglu").half()))
    with pytest.raises(ValueError, match=r"^pack\(FeedForward\): up_proj.weight is float32 on meta"):
        pack(FeedForward(8, device="meta"))
    with pytest.raises(ValueError, match=r"^pack\(LayerNorm\): nothing to serve, no plain FeedForward"):
        pack(nn.LayerNorm(8))
    monkeypatch.setattr(dispatch, "packs", lambda dtype: False)
    with pytest.raises(ValueError, match="which oneDNN does not take on this processor or in this build"):
        pack(FeedForward(8))
    monkeypatch.setattr(packing, "WORTH_PACKING", 1 << 18)
    with pytest.raises(ValueError, match="of 262144 weights or more in it; leave it unpacked"):
        pack(FeedForward(8))
