"""timm's blocks: signatures, keys, numbers and draws of the originals, less kept, children called."""

import copy
import doctest
import io
import pickle
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import ffn.interop.timm as page
from ffn.interop.timm import GluMlp, Mlp, SwiGLU, SwiGLUPacked
from tests.interop.same import F64, assert_same, kept, outcome, parameters_of, twin

# Dynamo of torch 2.13 instantiates autograd contexts.
pytestmark = pytest.mark.filterwarnings(r"ignore:.*should not be instantiated:DeprecationWarning")

NAMES = ["Mlp", "GluMlp", "SwiGLU", "SwiGLUPacked"]
names = pytest.mark.parametrize("name", NAMES)
SIZES = {"in_features": 6, "hidden_features": 10, "out_features": 5, "dtype": F64}
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


def build(name: str, home=page, **options) -> nn.Module:
    block = getattr(home, name)(**{**SIZES, **options})
    for child in block.children():  # an activation with a weight of its own gets no dtype from timm
        child.to(SIZES["dtype"])
    return block


def written_out(block: nn.Module, x: Tensor) -> Tensor:
    """The block's formula, from its weights and activation, without its forward and dropouts."""
    if hasattr(block, "fc1_g"):
        h = block.act(block.fc1_g(x)) * block.fc1_x(x)
    elif hasattr(block, "gate_last"):
        a, b = block.fc1(x).tensor_split(2, -1)
        h = a * block.act(b) if block.gate_last else block.act(a) * b
    else:
        h = block.act(block.fc1(x))
    return block.fc2(block.norm(h))


def rows() -> Tensor:
    return torch.randn(2, 3, 6, dtype=F64)


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


@names
def test_a_dropouts_own_mode_and_later_changes_count(name: str) -> None:
    block, x = build(name, drop=(0.5, 0.5)), rows()
    still = copy.deepcopy(block).eval()(x)
    block.drop1.eval()
    block.drop2.eval()
    assert_same({"y": block(x)}, {"y": still})
    block.drop1.train()
    block.drop1.p = 0.0
    assert_same({"y": block(x)}, {"y": still})
    block.drop2.p, block.drop2.training = 1.0, True
    assert not block(x).any()
    block.eval()
    block.act = nn.ReLU()
    assert_same({"y": block(x)}, {"y": written_out(block, x)})
    block.norm = nn.LayerNorm(block.fc2.in_features, dtype=F64)
    assert_same({"y": block(x)}, {"y": written_out(block, x)})


@names
def test_hooks_of_all_children_fire(name: str) -> None:
    block, x = build(name, drop=0.2), rows().requires_grad_()
    for child in block.children():
        for register in ("forward_pre_hook", "forward_hook", "full_backward_pre_hook", "full_backward_hook"):
            fired = []
            handle = getattr(child, f"register_{register}")(lambda *_, fired=fired: fired.append(1))
            block(x).sum().backward()
            handle.remove()
            assert fired == [1], (register, child)


@names
def test_replaced_children_are_called(name: str) -> None:
    x = rows()
    for child in ("fc1", "fc1_g", "fc1_x", "fc2"):
        block = build(name)
        if not hasattr(block, child):
            continue
        before, old = block(x), getattr(block, child)
        setattr(block, child, nn.Sequential(old, nn.Hardtanh(-0.1, 0.1)))
        assert not torch.allclose(block(x), before)
        assert_same({"y": block(x)}, {"y": written_out(block, x)})


@names
def test_copies_and_casts(name: str) -> None:
    block, x = build(name, drop=0.3), rows()
    buffer = io.BytesIO()
    torch.save(block, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block)), loaded):
        assert_same(outcome(other, x), outcome(block, x))
        with torch.no_grad():
            other.fc2.weight.zero_()
        assert block.fc2.weight.any()
    half = build(name, dtype=None).to(torch.bfloat16)
    assert half(x.bfloat16()).dtype == torch.bfloat16
    meta = getattr(page, name)(6, 10, device="meta")
    assert meta(torch.empty(3, 6, device="meta")).shape == (3, 6)
    single = block.float()
    with torch.autocast("cpu", torch.bfloat16):
        y = single(x.float())
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in single.parameters())


@names
def test_compile_fx_vmap_and_functional_calls_see_the_block(name: str) -> None:
    block, x = build(name), rows()
    expected = outcome(block, x)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    found = outcome(compiled, x)
    assert_same(dict(zip(expected, found.values(), strict=True)), expected)
    y = expected["y"]
    assert_same({"y": torch.fx.symbolic_trace(block)(x)}, {"y": y})
    assert_same({"y": torch.vmap(block)(x)}, {"y": y})
    state = {key: value.detach() for key, value in block.state_dict().items()}
    assert_same({"y": torch.func.functional_call(block, state, (x,))}, {"y": y})
    exported = torch.export.export(block, (x,)).module()
    assert_same({"y": exported(x)}, {"y": y})


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


def test_adapters_of_peft_take_effect() -> None:
    peft = pytest.importorskip("peft")
    timm = pytest.importorskip("timm.layers.mlp")
    ours, theirs = build("Mlp", out_features=6), build("Mlp", timm, out_features=6)
    twin(theirs, ours)
    x = rows()
    before = ours(x)
    config = peft.LoraConfig(r=2, target_modules=["fc1", "fc2"], init_lora_weights=False)
    adapted = [peft.get_peft_model(nn.Sequential(block), config).double() for block in (ours, theirs)]
    adapted[0].load_state_dict(adapted[1].state_dict())
    found, expected = (outcome(model, x) for model in adapted)
    assert sum("lora" in name for name in found) == 4
    assert_same(found, expected)
    assert not torch.allclose(found["y"], before)
    merged = adapted[0].merge_and_unload()
    assert_same({"y": merged(x)}, {"y": found["y"]})
    assert kept(merged[0].requires_grad_(), x) == {F64: 6 * 16}, "the op has the weights again"
