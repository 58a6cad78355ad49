"""Packing: the same numbers from copies that follow the weights, and aside wherever they will not do."""

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn

import ffn
from ffn import FeedForward, Transformer, TransformerConfig, pack, packing, packing_error, unpack
from ffn.nn.attention import Attention
from ffn.nn.head import Head
from ffn.ops import dispatch
from tests.nn.test_children import CHANGES

ACTIVATIONS = pytest.mark.parametrize("activation", ["gelu", "relu2", "swiglu"])
INT8 = pytest.param(
    "int8",
    marks=pytest.mark.skipif(not dispatch.int8_in_onednn(), reason="no int8 products on this processor"),
)
FORMS = pytest.mark.parametrize("form", ["float", INT8])


@pytest.fixture(autouse=True)
def _small_is_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    if not dispatch.packs(torch.float32):
        pytest.skip("oneDNN packs nothing in this build of torch")
    monkeypatch.setattr(packing, "WORTH_PACKING", 0)


def build(
    activation: str = "swiglu", form: str = "float", **options
) -> tuple[FeedForward, FeedForward, Tensor]:
    """A packed block, the same block unpacked, and tokens."""
    plain = FeedForward(64, 96, activation=activation, **options)
    return pack(copy.deepcopy(plain), form), plain, torch.randn(3, 5, 64)


def same(block: FeedForward, plain: FeedForward, x: Tensor) -> None:
    """The block runs packed and gives what the plain one with its weights gives, in int8 once packed."""
    plain.load_state_dict(block.state_dict())
    with torch.no_grad():
        assert block.explain(x).startswith("packed: ")
        if "int8" in block.explain(x):
            assert torch.equal(block(x), pack(copy.deepcopy(plain), "int8")(x))
            return
        loose = {"atol": 1e-2, "rtol": 2e-2} if x.dtype == torch.bfloat16 else {}
        torch.testing.assert_close(block(x), plain(x), **loose)


@ACTIVATIONS
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


@FORMS
def test_copies_and_pickles_make_their_own(form: str) -> None:
    block, plain, x = build(form=form)
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
        assert packed.count(Attention) == 2
        assert packed.count(nn.Linear) == 2
        assert packed.count(Head) == 1
        assert len(packed) == 7
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


def small_model(**options) -> Transformer:
    sizes = {"vocab_size": 50, "dim": 32, "num_layers": 2, "num_heads": 2, "max_seq_len": 16}
    return Transformer(TransformerConfig(**sizes, **options)).eval()


@pytest.mark.parametrize("form", [INT8])
def test_int8_through_a_whole_model(form: str) -> None:
    model, tokens = small_model(attention_bias=True, num_kv_heads=1), torch.randint(50, (2, 9))
    state = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        want = model(tokens)
        assert pack(model, form) is model
        got = model(tokens)
        assert 0.0 < (got - want).norm() < 0.05 * want.norm()
    row = ffn.generate(model, [[1, 2, 3]], 5, temperature=0.0)
    assert ffn.generate(model, [[1, 2, 3]], 5, temperature=0.0) == row
    with torch.no_grad():
        assert torch.equal(model(tokens), got)  # int8 still
        assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
        assert len(state) == len(model.state_dict())
        assert torch.equal(unpack(model)(tokens), want)


@FORMS
def test_the_error_is_reported(form: str) -> None:
    model, tokens = pack(small_model(), form), torch.randint(50, (2, 9))
    packed = [name for name, module in model.named_modules() if packing.is_packed(module)]
    with torch.no_grad():
        got = model(tokens)
        errors = packing_error(model, tokens)
        assert sorted(errors) == sorted(["", *packed])
        low, high = (1e-3, 0.05) if form == "int8" else (0.0, 1e-6)
        assert all(low <= error <= high for error in errors.values())
        assert torch.equal(model(tokens), got)
        assert not model.head._forward_hooks
        want = unpack(copy.deepcopy(model))(tokens)
    assert errors[""] == pytest.approx(((got - want).norm() / want.norm()).item(), rel=1e-3)
    with pytest.raises(ValueError, match="wants tokens"):
        packing_error(model, tokens[0])
    assert [name for name, module in model.named_modules() if packing.is_packed(module)] == packed
    assert packing_error(unpack(model), tokens) == {"": 0.0}
    block = pack(FeedForward(8), form)
    assert packing_error(block, torch.zeros(3, 8)).keys() == {""}


@pytest.mark.parametrize("form", [INT8])
def test_the_last_form_holds(form: str) -> None:
    block, plain, x = build(form=form)
    same(block, plain, x)
    assert torch.equal(pack(block)(x), plain(x))
    same(block, plain, x)
    with torch.no_grad():
        torch.testing.assert_close(block(x), plain(x))
        assert not torch.allclose(pack(block, form)(x), plain(x))
    with pytest.raises(ValueError, match=r"^pack\(form='int4'\): no such form; choose one of float, int8$"):
        pack(block, "int4")
    block.up_proj.half()
    with pytest.raises(
        ValueError, match=r"^pack\(FeedForward\): up_proj.weight is float16 on cpu; oneDNN packs"
    ):
        pack(block)
    block.up_proj.float()
    same(block, plain, x)


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
    monkeypatch.setattr(dispatch, "int8_in_onednn", lambda: False)
    with pytest.raises(ValueError, match=r"up_proj\.weight is float32 on cpu, which oneDNN does not take"):
        pack(FeedForward(8), "int8")
    monkeypatch.setattr(packing, "WORTH_PACKING", 1 << 18)
    with pytest.raises(ValueError, match="of 262144 weights or more in it; leave it unpacked"):
        pack(FeedForward(8))
