"""Swapped layers of torch's own Transformer, which have a fast path in eval mode, and of other libraries."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ffn
from ffn.interop.swap.reroute import Rerouted
from tests.interop.swap.same import DYNAMOS_OWN, F64, assert_same, kept, outcome

pytestmark = [
    DYNAMOS_OWN,
    # torch's encoder makes nested tensors of a padding mask in eval mode
    pytest.mark.filterwarnings(r"ignore:The PyTorch API of nested tensors:UserWarning"),
    # torch's encoder warns that its nested tensors need an even number of heads
    pytest.mark.filterwarnings(r"ignore:enable_nested_tensor is True:UserWarning"),
]

ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "silu": F.silu, "GELU": nn.GELU("tanh")}
OPTIONS = [{}, {"norm_first": True}, {"batch_first": False}, {"bias": False}]
SIZES = {"d_model": 8, "nhead": 2, "dim_feedforward": 20, "dropout": 0.0}


def layer(kind=nn.TransformerEncoderLayer, **options) -> nn.Module:
    return kind(**{**SIZES, "batch_first": True, "dtype": F64, **options})


def encoder(**options) -> nn.Module:
    model = nn.TransformerEncoder(layer(**options), 2)
    with torch.no_grad():  # TransformerEncoder copies one layer
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return model


def pair(old: nn.Module, count: int) -> tuple[nn.Module, nn.Module]:
    new = copy.deepcopy(old)
    report = ffn.swap(new)
    assert [block.action for block in report] == ["swapped"] * count, str(report)
    return old, new


def rows() -> Tensor:
    return torch.randn(2, 5, 8, dtype=F64, generator=torch.Generator().manual_seed(7))


PADDING = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])


@pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_an_encoder_layer_gives_the_same_in_both_modes(activation, options: dict) -> None:
    old, new = pair(layer(activation=activation, **options), 1)
    for training in (True, False):
        for model in (old, new):
            model.train(training)
        assert_same(outcome(new, rows()), outcome(old, rows()))
        if activation is not ACTIVATIONS["GELU"]:  # torch's fast path computes any nn.GELU with erf
            with torch.no_grad():
                assert_same({"y": new(rows())}, {"y": old(rows())})
    fewer = sum(kept(old.train(), rows()).values()) - sum(kept(new.train(), rows()).values())
    assert fewer == (0 if activation == "relu" else 10 * 20)


def test_the_op_runs_in_eval_mode_and_changed_children_take_effect() -> None:
    _, new = pair(layer().eval(), 1)
    calls: list[int] = []
    method = type(new)._ffn_reroute

    class Watched(type(new)):  # type: ignore[misc]
        def _ffn_reroute(self, x):
            calls.append(1)
            return method(self, x)

    new.__class__ = Watched
    with torch.no_grad():
        y = new(rows())
    assert calls == [1], "the fast path would not call it"
    old = layer().eval()
    old.load_state_dict(new.state_dict())
    for model in (old, new):
        model.linear1 = nn.Sequential(model.linear1, nn.Tanh())
        model.linear1.weight, model.linear1.bias = model.linear1[0].weight, model.linear1[0].bias
    with torch.no_grad():
        assert_same({"y": new(rows())}, {"y": old.train()(rows())})
        assert not torch.equal(new(rows()), y)


@pytest.mark.parametrize("whole", [True, False], ids=["the encoder", "its layers"])
def test_an_encoder_with_padding_gives_the_same_in_all_modes(whole: bool) -> None:
    old = encoder()
    new = copy.deepcopy(old)
    for part in [new] if whole else list(new.layers):
        assert all(block.action == "swapped" for block in ffn.swap(part))
    assert sum(isinstance(m, Rerouted) for m in new.modules()) == 2
    for options in ({}, {"src_key_padding_mask": PADDING}, {"mask": torch.triu(torch.ones(5, 5), 1).bool()}):
        for training in (True, False):
            for model in (old, new):
                model.train(training)
            for graded in (True, False):
                with torch.set_grad_enabled(graded):
                    y, expected = new(rows(), **options), old(rows(), **options)
                valid = ~PADDING if "src_key_padding_mask" in options else torch.ones(2, 5, dtype=torch.bool)
                assert_same({"y": y[valid]}, {"y": expected[valid]})
    assert_same(outcome(new, rows()), outcome(old, rows()))
    before = copy.copy(vars(old))
    assert vars(new).keys() == before.keys()
    assert new.use_nested_tensor == old.use_nested_tensor


def test_a_nested_tensor_takes_the_same_path_as_before() -> None:
    old, new = pair(layer().eval(), 1)
    nested = torch.nested.nested_tensor([rows()[0], rows()[1, :3]])
    with torch.no_grad():
        y, expected = new(nested), old(nested)
        assert "_ffn_nested" not in vars(new)
        assert_same({"y": y.to_padded_tensor(0.0)}, {"y": expected.to_padded_tensor(0.0)})
        assert_same({"y": new(rows())}, {"y": old(rows())})


@pytest.mark.parametrize("name", [*ACTIVATIONS][:-1])  # a copied layer loses a module as activation
def test_a_decoder_layer_gives_the_same(name: str) -> None:
    old, new = pair(layer(nn.TransformerDecoderLayer, activation=ACTIVATIONS[name]), 1)
    memory = rows().flip(0)

    class Given(nn.Module):
        def __init__(self, inner: nn.Module):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x, memory, tgt_is_causal=False)

    assert_same(outcome(Given(new), rows()), outcome(Given(old), rows()))
    with torch.no_grad():
        assert_same({"y": new.eval()(rows(), memory)}, {"y": old.eval()(rows(), memory)})


def test_a_transformer_is_swapped_copied_and_unswapped() -> None:
    sizes = {"num_encoder_layers": 2, "num_decoder_layers": 2, **SIZES}
    old, new = pair(nn.Transformer(**sizes, batch_first=True, dtype=F64), 4)
    for other in (new, copy.deepcopy(new)):
        for training in (True, False):
            y = other.train(training)(rows(), rows().flip(1))
            assert_same({"y": y}, {"y": old.train(training)(rows(), rows().flip(1))})
        assert ffn.unswap(other) == 4
        for m, o in zip(other.modules(), old.modules(), strict=True):
            assert type(m) is type(o)
            assert vars(m).keys() == vars(o).keys()
        assert other.encoder.layers[0].activation_relu_or_gelu == 1


def test_dropout_in_a_layer_repeats_by_seed() -> None:
    _, new = pair(layer(dropout=0.4), 1)
    assert_same(outcome(new, rows(), 1), outcome(new, rows(), 1))
    assert not torch.equal(outcome(new, rows(), 1)["y"], outcome(new, rows(), 2)["y"])
    new.dropout.p = 0.1
    assert ffn.interop.swap.reroute.current_rate(new, new._ffn_plan) == 0.1


def test_a_compiled_encoder_is_one_graph() -> None:
    old, new = pair(encoder(), 2)
    expected = outcome(old, rows())
    found = outcome(torch.compile(new, fullgraph=True, backend="aot_eager"), rows())
    assert_same(dict(zip(expected, found.values(), strict=True)), expected)


VISION = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 3}


@pytest.mark.parametrize("name", ["Mlp", "SwiGLUPacked", "GluMlp", "SwiGLU"])
def test_vision_transformers_of_timm_give_the_same(name: str) -> None:
    layers = pytest.importorskip("timm.layers.mlp")
    vision = pytest.importorskip("timm.models.vision_transformer").VisionTransformer
    old, new = pair(vision(mlp_layer=getattr(layers, name), proj_drop_rate=0.0, **VISION).double(), 2)
    x = torch.randn(2, 3, 8, 8, dtype=F64)
    assert_same(outcome(new, x), outcome(old, x))
    assert sum(kept(new, x).values()) < sum(kept(old, x).values())
    assert_same(outcome(copy.deepcopy(new), x), outcome(old, x))


FEEDS = [(), ("ff_glu",), ("ff_glu", "ff_swish"), ("ff_relu_squared",), ("ff_no_bias",)]


@pytest.mark.parametrize("options", FEEDS, ids=lambda o: "-".join(o) or "plain")
def test_x_transformers_give_the_same(options: tuple) -> None:
    library = pytest.importorskip("x_transformers")
    layers = library.Decoder(dim=16, depth=2, heads=2, attn_dim_head=8, **dict.fromkeys(options, True))
    model = library.TransformerWrapper(num_tokens=20, max_seq_len=8, attn_layers=layers).double()
    old, new = pair(model, 2)
    tokens = torch.arange(12).view(2, 6)

    def numbers(m: nn.Module) -> dict[str, Tensor]:
        y = m(tokens)
        names, weights = zip(*m.named_parameters(), strict=True)
        grads = torch.autograd.grad(y.square().sum(), weights, allow_unused=True)
        return {"y": y.detach()} | {n: g for n, g in zip(names, grads, strict=True) if g is not None}

    assert_same(numbers(new), numbers(old), 1e-10)
