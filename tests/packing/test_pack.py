"""Packing: a whole model and back, in either form, its error reported, and what is refused."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import ffn
from ffn import FeedForward, Transformer, TransformerConfig, pack, packing_error, unpack
from ffn.nn.attention import Attention
from ffn.nn.head import Head
from ffn.ops import dispatch
from ffn.packing import pack as packing
from tests.models import VARIANTS, tokens_of
from tests.models import build as build_model
from tests.packing.blocks import ACTIVATIONS, FORMS, INT8, build, same

pytestmark = pytest.mark.usefixtures("small_is_worth_it")


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


@pytest.mark.parametrize("name", ["gemma2", "neox", "olmo2", "bert"])
def test_whatever_a_model_is_made_of(name: str) -> None:
    model, tokens = build_model(torch.float32, **VARIANTS[name]).eval(), tokens_of(2, 9)
    real = torch.arange(9) >= torch.tensor([[3], [0]])
    with torch.no_grad():
        want = model(tokens), model(tokens, attention_mask=real)[real]
        pack(model)
        assert all(map(packing.is_packed, [model.head, *(block.attention for block in model.blocks)]))
        got = model(tokens), model(tokens, attention_mask=real)[real]
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


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
    with pytest.raises(
        ValueError, match=r"^packing_error\(Transformer\): nothing is packed; call pack first$"
    ):
        packing_error(unpack(model), tokens)
    block = pack(FeedForward(8), form)
    assert packing_error(block, torch.zeros(3, 8)).keys() == {""}


def test_the_error_is_that_of_eval_mode() -> None:
    block = pack(FeedForward(8, 16, dropout=0.5, out_dropout=0.5), "int8")
    assert packing_error(block, torch.randn(3, 8))[""] < 0.1
    assert block.training
    assert block.up_proj.training


def test_the_error_of_what_is_no_tensor() -> None:
    class Pair(nn.Sequential):
        def forward(self, x):
            return super().forward(x), x

    model = pack(Pair(FeedForward(8)))
    with pytest.raises(
        TypeError, match=r"^packing_error\(Pair\) wants a tensor as output; got a tuple; wrap"
    ):
        packing_error(model, torch.randn(3, 8))
    assert model.training
    assert packing.is_packed(model[0])


def test_an_error_beside_nothing_is_infinite() -> None:
    linear = nn.Linear(8, 1, bias=False)
    linear.weight.data = torch.tensor([[1.0, -2.0, -1.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    x = torch.tensor([[3.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    assert packing_error(pack(linear, "int8"), x)[""] in (
        0.0,
        float("inf"),
    )  # 0 where it rounds without an error


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


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TypeError, match=r"^pack wants a torch module; got a Tensor$"):
        pack(torch.zeros(3))
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
