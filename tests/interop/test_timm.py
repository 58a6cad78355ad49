"""timm's blocks: signatures, keys, numbers and draws of the originals, less kept."""

import doctest
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import ffn.interop.timm as page
from ffn.interop.timm import GluMlp, Mlp, SwiGLU, SwiGLUPacked
from tests.interop.swap.same import DYNAMOS_OWN, F64, assert_same, kept, outcome, parameters_of, twin
from tests.interop.timm_blocks import build, names, rows, written_out

pytestmark = DYNAMOS_OWN

OPTIONS = [
    {},
    {"bias": False},
    {"bias": (True, False)},
    {"act_layer": nn.SiLU},
    {"act_layer": partial(nn.GELU, approximate="tanh")},
    {"act_layer": nn.ReLU},
    {"act_layer": nn.Tanh},
    {"act_layer": nn.Hardswish},
    {"act_layer": nn.PReLU},
    {"norm_layer": nn.LayerNorm},
    {"norm_layer": partial(nn.RMSNorm, eps=1e-3), "bias": (False, True)},
    {"drop": 0.3},
    {"drop": (0.0, 0.2)},
]


@names
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_block_is_its_formula(name: str, options: dict) -> None:
    block, x = build(name, **options).eval(), rows()

    class Formula(nn.Module):
        __call__ = staticmethod(partial(written_out, block))
        named_parameters = block.named_parameters

    assert_same(outcome(block, x), outcome(Formula(), x))


@names
def test_signatures_and_what_is_drawn_are_the_originals(name: str) -> None:
    timm = pytest.importorskip("timm.layers")
    ours, theirs = getattr(page, name), getattr(timm, name, None) or timm.mlp.SwiGLUPacked
    assert parameters_of(ours) == parameters_of(theirs)
    for options in ({}, {"align_to": 8} if name == "SwiGLU" else {"use_conv": True}, {"act_layer": nn.ReLU}):
        for sizes in ((6,), (6, 10), (6, 10, 5), (6, 0, None)):
            states = []
            for kind in (ours, theirs):
                torch.manual_seed(3)
                block = kind(*sizes, **options)
                states.append(block.state_dict())
                if hasattr(block, "init_weights"):
                    block.init_weights()
                states += [block.state_dict(), {"": torch.rand(1)}]
                text = repr(block)
            assert text == repr(ours(*sizes, **options))
            for a, b in zip(states[:3], states[3:], strict=True):
                assert_same(a, b, 0.0)


@names
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_numbers_are_the_originals(name: str, options: dict) -> None:
    timm = pytest.importorskip("timm.layers.mlp")
    ours, theirs = build(name, **options), build(name, timm, **options)
    twin(theirs, ours)
    if "drop" in options:
        ours.eval()
        theirs.eval()
    for x in (rows(), rows()[0, 0], rows()[:0], rows().transpose(0, 1)):
        assert_same(outcome(ours, x), outcome(theirs, x))


@names
def test_numbers_with_timms_own_activations(name: str) -> None:
    timm = pytest.importorskip("timm.layers")
    for kind in (
        "GELU",
        "GELUTanh",
        "QuickGELU",
        "Sigmoid",
        "Tanh",
        "Swish",
        "HardSwish",
        "PReLU",
        "SwishMe",
    ):
        act = getattr(timm, kind, None) or getattr(timm.activations_me, kind)
        ours, theirs = build(name, act_layer=act), build(name, timm.mlp, act_layer=act)
        twin(theirs, ours)
        x = rows()
        assert_same(outcome(ours, x), outcome(theirs, x))
        shared = build(name, act_layer=ours.act)  # an instance
        shared.load_state_dict(ours.state_dict())
        assert shared.act is ours.act
        assert_same(outcome(shared, x), outcome(ours, x))


@pytest.mark.parametrize("name", ["Mlp", "GluMlp", "SwiGLUPacked"])
@pytest.mark.parametrize("norm_layer", [None, partial(nn.GroupNorm, 1)], ids=["no norm", "norm"])
def test_convolutions_take_pictures(name: str, norm_layer) -> None:
    timm = pytest.importorskip("timm.layers.mlp")
    options = {"use_conv": True, "norm_layer": norm_layer}
    ours, theirs = build(name, **options), build(name, timm, **options)
    twin(theirs, ours)
    x = torch.randn(2, 6, 4, 3, dtype=F64)
    assert ours(x).shape == (2, 5, 4, 3)
    assert_same(outcome(ours, x), outcome(theirs, x))


@names
def test_what_is_kept_for_backward(name: str) -> None:
    hidden = {"Mlp": 10, "GluMlp": 10, "SwiGLU": 20, "SwiGLUPacked": 10}[name]  # H, and 2 H where gated
    for drop, seeds in ((0.0, {}), ((0.3, 0.0), {torch.int64: 1}), (0.3, {torch.int64: 2})):
        assert kept(build(name, drop=drop), rows()) == {F64: 6 * (6 + hidden), **seeds}
    timm = pytest.importorskip("timm.layers.mlp")
    assert kept(build(name, timm), rows())[F64] > 6 * (6 + hidden)


def through(drop, second=nn.init.eye_) -> Tensor:
    """What becomes of 64 tokens of ones where fc1 is the identity and fc2 is `second`."""
    block = Mlp(64, bias=False, act_layer=nn.Identity, drop=drop)
    nn.init.eye_(block.fc1.weight)
    second(block.fc2.weight)
    return block(torch.ones(64, 64)).detach()


def test_drop1_comes_before_fc2_and_drop2_after() -> None:
    for drop, values, dropped in (
        ((0.5, 0.0), {0.0, 2.0}, 0.5),
        ((0.0, 0.5), {0.0, 2.0}, 0.5),
        (0.5, {0.0, 4.0}, 0.75),
    ):
        y = through(drop)
        assert set(y.unique().tolist()) == values
        assert abs((y == 0).float().mean() - dropped) < 0.05
    sums = through((0.5, 0.0), nn.init.ones_)
    assert torch.equal(sums, sums[:, :1].expand(64, 64)), "the outputs of a token see one hidden mask"
    assert len(sums.unique()) > 5
    for drop in ((1.0, 0.0), (0.0, 1.0)):
        assert not through(drop).any()


@names
def test_dropout_is_one_mask_both_ways_and_repeats_by_seed(name: str) -> None:
    block, x = build(name, hidden_features=40, drop=(0.4, 0.2)), rows()
    first, again, other = outcome(block, x, 1), outcome(block, x, 1), outcome(block, x, 2)
    assert_same(again, first)
    assert not torch.equal(other["y"], first["y"])
    assert (first["y"] == 0).any()

    def repeat(x: Tensor) -> Tensor:
        torch.manual_seed(1)
        return block(x)

    assert torch.autograd.gradcheck(repeat, x.requires_grad_())
    assert_same({"y": block.eval()(x)}, {"y": block(x)})


def test_an_odd_packed_width_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^hidden_features=7: want an even number, half of it is the gate$"):
        GluMlp(7)
    assert isinstance(SwiGLUPacked(8), GluMlp)
    assert SwiGLU(8, 9, align_to=4).fc2.in_features == 12
    assert doctest.testmod(page, extraglobs={"torch": torch}).failed == 0


def vision(layer) -> nn.Module:
    model = pytest.importorskip("timm.models.vision_transformer").VisionTransformer(
        img_size=8, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=3, mlp_layer=layer
    )
    return model.double()


@names
def test_a_vision_transformer_of_them_is_the_original(name: str) -> None:
    timm = pytest.importorskip("timm.layers.mlp")
    ours, theirs = vision(getattr(page, name)), vision(getattr(timm, name))
    assert sum(type(m).__module__ == page.__name__ for m in ours.modules()) == 2
    twin(theirs, ours)
    x = torch.randn(2, 3, 8, 8, dtype=F64)
    expected = outcome(theirs, x)
    assert_same(outcome(ours, x), expected)
    found = outcome(torch.compile(ours, fullgraph=True, backend="aot_eager"), x)
    assert_same(dict(zip(expected, found.values(), strict=True)), expected)
