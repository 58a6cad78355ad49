"""Packing: pack converts a model, unpack restores it, packing_error measures the error."""

import copy
import io
import pickle
from contextlib import suppress

import pytest
import torch
from torch import nn

import ffn
from ffn import FeedForward, Transformer, TransformerConfig, pack, packing_error, unpack
from ffn.gpt.adapters import AdapterConfig, add_adapters
from ffn.nn.attention import Attention
from ffn.nn.head import Head
from ffn.nn.lora import LoRALinear
from ffn.ops import hardware
from ffn.packing import pack as packing
from ffn.packing.forwards import PackedForward
from ffn.packing.pack import is_packed, packed_where_possible
from tests.models import VARIANTS, tokens_of
from tests.models import build as build_model
from tests.packing.blocks import ACTIVATIONS, FORMS, INT8, assert_same, build

pytestmark = pytest.mark.usefixtures("small_is_worth_it")


def small_model(**options) -> Transformer:
    sizes = {"vocab_size": 50, "dim": 32, "num_layers": 2, "num_heads": 2, "max_seq_len": 16}
    return Transformer(TransformerConfig(**sizes, **options)).eval()


def attributes(model: nn.Module) -> list[set[str]]:
    return [set(module.__dict__) for module in model.modules()]


def packed_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if is_packed(module)]


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The modules with weights that have been copied, one entry per copy."""
    made, copy_weights = [], PackedForward.copy

    def counted(forward: PackedForward, tensors):
        made.append(forward.module)
        return copy_weights(forward, tensors)

    monkeypatch.setattr(PackedForward, "copy", counted)
    return made


@ACTIVATIONS
def test_unpack_restores_the_block(activation: str) -> None:
    block, plain, x = build(activation)
    assert_same(block, plain, x)
    with torch.inference_mode():
        torch.testing.assert_close(block(x), plain(x))
    assert block.state_dict().keys() == plain.state_dict().keys()
    assert unpack(block) is block
    assert attributes(block) == attributes(plain)
    with torch.no_grad():
        assert not block.explain(x).startswith("packed: ")
        assert torch.equal(block(x), plain(x))
    assert unpack(block) is block


@FORMS
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_weights_are_copied_by_pack_and_not_by_the_calls(
    form: str, tied: bool, training: bool, copied: list[nn.Module]
) -> None:
    model = small_model(tie_embeddings=tied, dropout=0.1).train(training)
    assert pack(model, form) is model
    packed = [module for module in model.modules() if is_packed(module)]
    assert copied == packed
    with torch.no_grad():
        model.eval()(torch.randint(50, (2, 9)))
        assert len(copied) == len(packed)
        model.blocks[1].feed_forward.up_proj.weight.mul_(2.0)
        for _ in range(2):
            model(torch.randint(50, (2, 9)))
    assert copied == [*packed, model.blocks[1].feed_forward]


@FORMS
def test_packing_twice_is_packing_once(form: str) -> None:
    model, tokens = small_model(), torch.randint(50, (2, 9))
    before = attributes(model)
    with torch.no_grad():
        names, once = packed_names(pack(model, form)), model(tokens)
        assert packed_names(pack(model, form)) == names
        assert torch.equal(model(tokens), once)
    assert attributes(unpack(model)) == before


@FORMS
def test_deep_copies_and_pickles_are_packed_and_make_their_own_copies(form: str) -> None:
    block, plain, x = build(form=form)
    assert_same(block, plain, x)
    file = io.BytesIO()
    torch.save(block, file)
    size = len(pickle.dumps(block))
    assert size < len(pickle.dumps(plain)) + 1000
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block)), loaded):
        assert other.forward.__self__.module is other
        assert_same(other, copy.deepcopy(plain), x)
        with torch.no_grad():
            other.down_proj.weight.zero_()
            other.down_proj.bias.zero_()
            assert torch.equal(other(x), torch.zeros_like(x))
        assert_same(block, plain, x)
    assert not is_packed(unpack(copy.deepcopy(block)))


def test_a_packed_model_equals_the_plain_one() -> None:
    model, tokens = small_model(), torch.randint(50, (2, 9))
    with torch.no_grad():
        want = model(tokens)
        pack(model)
        packed = [type(module) for module in model.modules() if is_packed(module)]
        assert sorted(packed, key=str) == sorted([FeedForward, Attention, nn.Linear] * 2 + [Head], key=str)
        torch.testing.assert_close(model(tokens), want)
        model.embedding.weight.mul_(2.0)
        changed = model(tokens)
        unpack(model)
        torch.testing.assert_close(model(tokens), changed)


@pytest.mark.parametrize("packs", [True, False])
def test_generate_leaves_a_model_packed_or_plain(packs: bool) -> None:
    model = small_model()
    want = ffn.generate(model, [[1, 2, 3]], 5, temperature=0.0)
    if packs:
        pack(model)
    before, names = attributes(model), packed_names(model)
    assert ffn.generate(model, [[1, 2, 3]], 5, temperature=0.0) == want
    assert attributes(model) == before
    assert packed_names(model) == names


def test_packed_where_possible_unpacks_afterwards() -> None:
    model = small_model()
    before = attributes(model)
    with packed_where_possible(model):
        assert is_packed(model.head)
    assert attributes(model) == before
    with suppress(KeyError), packed_where_possible(model):
        raise KeyError
    assert attributes(model) == before
    with torch.autocast("cpu", torch.bfloat16), packed_where_possible(model):
        assert not packed_names(model)
    for refused in (small_model().double(), small_model().to("meta"), nn.LayerNorm(8)):
        with packed_where_possible(refused):
            assert not packed_names(refused)


@pytest.mark.parametrize("name", ["gemma2", "neox", "olmo2", "bert"])
def test_every_architecture_equals_the_plain_one(name: str) -> None:
    model, tokens = build_model(torch.float32, **VARIANTS[name]).eval(), tokens_of(2, 9)
    real = torch.arange(9) >= torch.tensor([[3], [0]])
    with torch.no_grad():
        want = model(tokens), model(tokens, attention_mask=real)[real]
        pack(model)
        assert all(map(is_packed, [model.head, *(block.attention for block in model.blocks)]))
        got = model(tokens), model(tokens, attention_mask=real)[real]
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("form", [INT8])
def test_an_int8_model_is_near_the_plain_one(form: str) -> None:
    model, tokens = small_model(attention_bias=True, num_kv_heads=1), torch.randint(50, (2, 9))
    state = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        want = model(tokens)
        got = pack(model, form)(tokens)
        assert 0.0 < (got - want).norm() < 0.05 * want.norm()
        assert len(state) == len(model.state_dict())
        assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
        assert torch.equal(unpack(model)(tokens), want)


@FORMS
def test_packing_error_measures_each_packed_module(form: str) -> None:
    model, tokens = pack(small_model(), form), torch.randint(50, (2, 9))
    names = packed_names(model)
    with torch.no_grad():
        got = model(tokens)
        errors = packing_error(model, tokens)
        assert sorted(errors) == sorted(["", *names])
        low, high = (1e-3, 0.05) if form == "int8" else (0.0, 1e-6)
        assert all(low <= error <= high for error in errors.values())
        assert torch.equal(model(tokens), got)
        assert not model.head._forward_hooks
        want = unpack(copy.deepcopy(model))(tokens)
    assert errors[""] == pytest.approx(((got - want).norm() / want.norm()).item(), rel=1e-3)
    with pytest.raises(ValueError, match="tokens"):
        packing_error(model, tokens[0])
    assert packed_names(model) == names
    with pytest.raises(ValueError, match="pack"):
        packing_error(unpack(model), tokens)
    block = pack(FeedForward(8), form)
    assert packing_error(block, torch.zeros(3, 8)).keys() == {""}


def test_packing_error_runs_in_eval_mode() -> None:
    block = pack(FeedForward(8, 16, dropout=0.5, out_dropout=0.5), "int8")
    assert packing_error(block, torch.randn(3, 8))[""] < 0.1
    assert block.training
    assert block.up_proj.training


def test_packing_error_refuses_an_output_that_is_not_a_tensor() -> None:
    class Pair(nn.Sequential):
        def forward(self, x):
            return super().forward(x), x

    model = pack(Pair(FeedForward(8)))
    with pytest.raises(TypeError, match="model must return a tensor"):
        packing_error(model, torch.randn(3, 8))
    assert model.training
    assert is_packed(model[0])


def test_the_error_of_an_output_of_zero_is_infinite() -> None:
    linear = nn.Linear(8, 1, bias=False)
    linear.weight.data = torch.tensor([[1.0, -2.0, -1.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    x = torch.tensor([[3.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    error = packing_error(pack(linear, "int8"), x)[""]
    assert error in (0.0, float("inf"))  # 0 where int8 rounds without an error


@pytest.mark.parametrize("form", [INT8])
def test_the_last_form_counts(form: str) -> None:
    block, plain, x = build(form=form)
    assert_same(block, plain, x)
    assert torch.equal(pack(block)(x), plain(x))
    assert_same(block, plain, x)
    with torch.no_grad():
        torch.testing.assert_close(block(x), plain(x))
        assert not torch.allclose(pack(block, form)(x), plain(x))


def test_a_refused_pack_changes_nothing(copied: list[nn.Module]) -> None:
    block, plain, x = build()
    with pytest.raises(ValueError, match="form"):
        pack(block, "int4")
    assert_same(block, plain, x)
    block.up_proj.half()
    with pytest.raises(ValueError, match=r"^model"):
        pack(block)
    block.up_proj.float()
    copied.clear()
    assert_same(block, plain, x)
    assert copied == [block]  # since its weights have moved


def test_models_that_cannot_be_packed_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TypeError, match="model must be"):
        pack(torch.zeros(3))
    with pytest.raises(ValueError, match=r"0\.\w+\.weight is torch\.float16 on cpu"):
        pack(nn.Sequential(FeedForward(8, activation="swiglu").half()))
    with pytest.raises(ValueError, match=r"up_proj\.weight is torch\.float32 on meta"):
        pack(FeedForward(8, device="meta"))
    with pytest.raises(ValueError, match="LayerNorm"):
        pack(nn.LayerNorm(8))
    with pytest.raises(ValueError, match="Head"):
        pack(Head(8, 20, tied=True))
    monkeypatch.setattr(hardware, "packs", lambda dtype: False)
    with pytest.raises(ValueError, match="oneDNN"):
        pack(FeedForward(8))
    monkeypatch.setattr(hardware, "int8_in_onednn", lambda: False)
    with pytest.raises(ValueError, match="oneDNN"):
        pack(FeedForward(8), "int8")
    monkeypatch.setattr(packing, "WORTH_PACKING", 1 << 18)
    with pytest.raises(ValueError, match="262144"):
        pack(FeedForward(8))


def test_a_block_with_an_adapter_stays_on_the_op() -> None:
    """pack leaves its other Linears alone: packed apart, they would take the block off the op."""
    block, x = FeedForward(32, 64), torch.randn(4, 32)
    block.up_proj = LoRALinear(block.up_proj, 2, 4.0)
    before = block.explain(x)
    model = nn.Sequential(block, nn.Linear(32, 32)).eval()
    pack(model)
    assert packed_names(model) == ["1"]
    assert block.explain(x) == before


def test_packing_error_refuses_to_measure_what_bypasses_packing() -> None:
    model = pack(FeedForward(32, 64).eval())
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match=r"^model must run without"):
        packing_error(model, torch.randn(4, 32))


def test_adapters_name_unpack_on_a_packed_model() -> None:
    model = pack(small_model())
    with pytest.raises(ValueError, match=r"ffn\.unpack"):
        add_adapters(model, AdapterConfig(targets=("attention",)))
