"""The module FeedForward: shapes, names, both paths, explain, repr and copies."""

import copy
import doctest
import io
import pickle
import re
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ffn.nn.feed_forward as page
from ffn.activations import TABLE
from ffn.nn import FeedForward, gated_hidden_dim
from ffn.ops import dispatch
from ffn.ops.feed_forward import feed_forward

F64 = torch.float64
NAMES = list(TABLE)
names = pytest.mark.parametrize("name", NAMES)


def weights(block: FeedForward) -> list[Tensor | None]:
    gate, up, down = block.gate_proj, block.up_proj, block.down_proj
    return [up.weight, down.weight, gate and gate.weight, up.bias, down.bias, gate and gate.bias]


def by_children(block: FeedForward) -> FeedForward:
    """Return a copy that calls its children, because one has a hook that does nothing."""
    other = copy.deepcopy(block)
    other.up_proj.register_forward_hook(lambda *_: None)
    assert other.explain(torch.ones(1, block.dim)).startswith("children: ")
    return other


def outcome(block: FeedForward, x: Tensor) -> list[Tensor]:
    """Return the output and all gradients, from a fixed seed."""
    torch.manual_seed(2)
    y = block(x)
    return [y, *torch.autograd.grad(y.square().sum(), [x, *block.parameters()])]


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_widths() -> None:
    assert FeedForward(64).hidden_dim == 256
    assert FeedForward(64, activation="swiglu").hidden_dim == gated_hidden_dim(64) == 256
    assert FeedForward(64, 100, activation="swiglu").hidden_dim == 100
    assert [gated_hidden_dim(d) for d in (4096, 48, 96, 5120)] == [11008, 128, 256, 13696]
    assert gated_hidden_dim(100, multiple_of=1) == 267
    for dim in (7, 768, 1000):
        assert 0 <= gated_hidden_dim(dim) - 8 * dim / 3 < 128
    block = FeedForward(100, 200, out_dim=50)
    assert block(torch.randn(32, 100)).shape == (32, 50)
    assert FeedForward(8)(torch.randn(8)).shape == (8,)
    assert doctest.testmod(page, extraglobs={"torch": torch}).failed == 0


@names
def test_children_are_linears_with_llama_names(name: str) -> None:
    gated = TABLE[name].gated
    for bias in (True, False):
        block = FeedForward(6, 10, out_dim=5, activation=name, bias=bias)
        shapes = {"gate_proj": (10, 6), "up_proj": (10, 6), "down_proj": (5, 10)}
        shapes = {key: shape for key, shape in shapes.items() if gated or key != "gate_proj"}
        assert [key for key, _ in block.named_children()] == list(shapes)
        assert all(type(child) is nn.Linear for child in block.children())
        assert {k: tuple(v.shape) for k, v in block.state_dict().items() if "weight" in k} == {
            f"{key}.weight": shape for key, shape in shapes.items()
        }
        assert len(block.state_dict()) == len(shapes) * (1 + bias)
    assert name in FeedForward.__doc__


@names
def test_module_op_and_children_agree(name: str) -> None:
    x = torch.randn(2, 3, 6, dtype=F64, requires_grad=True)
    for save in ({}, {"save": "input", "chunk_tokens": 4}):
        block = FeedForward(6, 10, 0.3, out_dim=5, activation=name, dtype=F64, **save)
        found = outcome(block, x)
        assert_same(outcome(by_children(block), x), found)
        torch.manual_seed(2)
        assert torch.equal(feed_forward(x, *weights(block), activation=name, dropout=0.3, **save), found[0])
        block.eval()
        torch.testing.assert_close(
            block(x), feed_forward(x, *weights(block), activation=name, backend="reference")
        )


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_factory_dtype_and_later_casts(dtype: torch.dtype) -> None:
    for block in (FeedForward(6, 10, dtype=dtype), FeedForward(6, 10).to(dtype)):
        assert all(p.dtype == dtype for p in block.parameters())
        y = block(torch.randn(2, 6, dtype=dtype))
        assert y.dtype == dtype
        y.sum().backward()
        assert all(p.grad.dtype == dtype for p in block.parameters())


def test_meta_device_then_to_empty_then_reset() -> None:
    block = FeedForward(6, 10, 0.1, out_dropout=0.1, activation="swiglu", device="meta")
    assert block(torch.randn(3, 6, device="meta")).shape == (3, 6)
    with pytest.raises(ValueError, match=r"gate must be on cpu"):
        block(torch.randn(3, 6))
    block.to_empty(device="cpu").reset_parameters()
    assert block(torch.randn(3, 6)).isfinite().all()
    with torch.device("meta"):
        assert FeedForward(6).up_proj.weight.is_meta


def test_autocast_casts_float32_weights() -> None:
    block, x = FeedForward(6, 10, 0.1, out_dropout=0.1, activation="geglu"), torch.randn(3, 6)
    for b in (block, by_children(block)):
        with torch.autocast("cpu", torch.bfloat16):
            y = b(x)
        assert y.dtype == torch.bfloat16
        y.float().sum().backward()
        assert all(p.grad.dtype == torch.float32 for p in b.parameters())


def test_prelu_is_registered_and_trained() -> None:
    block = FeedForward(6, 10, 0.2, activation=nn.PReLU(num_parameters=10, init=0.3))
    assert dict(block.named_parameters())["act.weight"].shape == (10,)
    assert "act.weight" in block.state_dict()
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
    before = block.act.weight.detach().clone()
    block(torch.randn(20, 6)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(block.act.weight, before)
    assert isinstance(FeedForward(6, activation=nn.PReLU).act, nn.PReLU)


@pytest.mark.parametrize("activation", [nn.PReLU, nn.PReLU()], ids=["class", "instance"])
def test_activation_module_gets_device_and_dtype(activation) -> None:
    block = FeedForward(6, 10, activation=activation, dtype=F64)
    assert block(torch.randn(3, 6, dtype=F64)).dtype == F64
    block = FeedForward(6, 10, activation=activation, device="meta")
    assert all(p.is_meta for p in block.parameters())


OTHERS = [
    nn.LeakyReLU(0.2),
    nn.Softplus(beta=2),
    lambda x: x.sin(),
    partial(F.gelu, approximate="tanh"),
    nn.ELU,
]


@pytest.mark.parametrize("activation", OTHERS)
def test_other_callables_run_under_plain_autograd(activation) -> None:
    block = FeedForward(6, 10, activation=activation, dtype=F64)
    function = activation() if isinstance(activation, type) else activation
    x = torch.randn(3, 6, dtype=F64, requires_grad=True)
    expected = block.down_proj(function(block.up_proj(x)))
    torch.testing.assert_close(block(x), expected)
    parts = [x, *block.parameters()]
    ours, theirs = (torch.autograd.grad(y.square().sum(), parts) for y in (block(x), expected))
    torch.testing.assert_close(ours, theirs)
    assert "(under plain autograd)" in repr(block)
    assert block.explain(x).endswith("is not in the table of activations")


def test_known_activations_take_the_fused_path() -> None:
    for given, name in (
        (nn.SiLU, "silu"),
        (nn.GELU("tanh"), "gelu_tanh"),
        (F.relu, "relu"),
        ("gelu_new", "gelu_tanh"),
    ):
        block = FeedForward(6, 10, activation=given)
        assert block.activation == name
        assert block.explain(torch.randn(2, 6)).startswith("eager: ")
        assert len(list(block.children())) == 2


def test_explain() -> None:
    x = torch.randn(2, 6)
    for activation, save, kept in (("gelu", "preact", 16), ("swiglu", "preact", 26), ("swiglu", "input", 6)):
        block = FeedForward(6, 10, activation=activation, save=save)
        why = dispatch.choose("auto", x.device, x.dtype).reason
        assert block.explain(x) == f"eager: {why}; keeps {kept} elements per token for backward"
    assert FeedForward(6, backend="reference").explain(x).startswith("reference: ")


def test_explain_raises_what_forward_raises() -> None:
    block, elsewhere = FeedForward(6, 10), torch.randn(2, 6, device="meta")
    integers, wider = torch.ones(2, 6, dtype=torch.int64), torch.randn(2, 6, dtype=F64)
    for x in (torch.randn(2, 7), integers, wider, elsewhere):
        with pytest.raises((TypeError, ValueError), match=r"^(x|gate|up|down) must be") as forward:
            block(x)
        with pytest.raises(type(forward.value), match=f"^{re.escape(str(forward.value))}$"):
            block.explain(x)
    block.save = "all"
    with pytest.raises(ValueError, match=r"^save must be"):
        block.explain(torch.randn(2, 6))


def test_explain_within_transforms() -> None:
    block, lines = FeedForward(6, 10), []
    torch.func.vmap(lambda row: lines.append(block.explain(row)) or block(row))(torch.randn(2, 6))
    (line,) = lines
    assert line.startswith("reference: torch.func, ")
    assert "keeps" not in line


def test_repr() -> None:
    assert repr(FeedForward(4, 8)).splitlines()[1].strip() == "4 -> 8 -> 4, activation=gelu"
    block = FeedForward(
        4,
        8,
        0.1,
        out_dim=2,
        activation="swiglu",
        out_dropout=0.2,
        save="input",
        chunk_tokens=16,
        backend="eager",
    )
    options = "dropout=0.1, out_dropout=0.2, save=input, chunk_tokens=16, backend=eager"
    assert block.extra_repr() == f"4 -> 8 -> 2, activation=swiglu, {options}"
    assert "gate_proj" in repr(block)


@pytest.mark.parametrize("name", ["gelu", "swiglu"])
def test_copies_behave_equally(name: str) -> None:
    block = FeedForward(6, 10, 0.3, activation=name, out_dropout=0.1, save="input", chunk_tokens=2, dtype=F64)
    x = torch.randn(5, 6, dtype=F64, requires_grad=True)
    buffer = io.BytesIO()
    torch.save(block, buffer)
    buffer.seek(0)
    loaded = FeedForward(6, 10, 0.3, activation=name, out_dropout=0.1, dtype=F64)
    assert loaded.load_state_dict(block.state_dict()) == ([], [])
    others = [
        copy.deepcopy(block),
        pickle.loads(pickle.dumps(block)),
        torch.load(buffer, weights_only=False),
        loaded,
    ]
    expected = outcome(block, x)
    for other in others:
        assert_same(outcome(other, x), expected)
        assert not {p.data_ptr() for p in other.parameters()} & {p.data_ptr() for p in block.parameters()}
    assert repr(others[0]) == repr(others[1]) == repr(block)
    with torch.no_grad():
        others[0].up_proj.weight.zero_()
    assert_same(outcome(block, x), expected)


def test_options_can_be_changed_later() -> None:
    block, x = FeedForward(6, 10), torch.randn(50, 6)
    y = block(x)
    block.dropout = 0.5
    assert not torch.equal(block(x), y)
    block.dropout, block.save, block.chunk_tokens = 0.0, "input", 7
    torch.testing.assert_close(block(x), y)
    block.train(False)
    block.dropout = 0.5
    torch.testing.assert_close(block(x), y)


def test_explain_under_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert "bfloat16" in FeedForward(4).explain(torch.randn(2, 4))
        with pytest.raises(ValueError, match=r"^x must be"):
            FeedForward(4).explain(torch.randn(2, 5))


def test_empty_module_as_activation() -> None:
    block, x = FeedForward(4, 6, activation=torch.nn.Sequential()), torch.randn(2, 4)
    torch.testing.assert_close(block(x), block.down_proj(block.up_proj(x)))
