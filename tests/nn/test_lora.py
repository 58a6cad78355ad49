"""LoRALinear alone and in the block: formula, path, saved elements, copies."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ffn.nn import FeedForward
from ffn.nn.lora import LoRALinear
from tests.kept import kept_for_backward

F64 = torch.float64
both = pytest.mark.parametrize("activation", ["gelu", "swiglu"])


def with_adapters(block: FeedForward, dropout: float = 0.0, *names: str) -> FeedForward:
    """Freeze the block and add random rank-3 adapters to the named children, or to all."""
    block.requires_grad_(False)
    for name, child in list(block.named_children()):
        if not names or name in names:
            adapted = LoRALinear(child, 3, 6.0, dropout)
            nn.init.normal_(adapted.lora_B, 0, 0.3)
            setattr(block, name, adapted)
    return block


def by_children(block: FeedForward) -> FeedForward:
    other = copy.deepcopy(block)
    other.up_proj.register_forward_hook(lambda *_: None)
    assert other.explain(torch.ones(1, block.dim, dtype=block.up_proj.weight.dtype)).startswith("children: ")
    return other


def outcome(block: FeedForward, x: Tensor) -> list[Tensor]:
    y = block(x)
    learning = [p for p in block.parameters() if p.requires_grad]
    return [y, *torch.autograd.grad(y.square().sum(), [x, *learning])]


@pytest.mark.parametrize("bias", [True, False])
def test_formula(bias: bool) -> None:
    linear = nn.Linear(5, 7, bias, dtype=F64)
    adapted = LoRALinear(linear, 2, 6.0)
    assert adapted.weight is linear.weight
    assert adapted.scale == 3.0
    x = torch.randn(2, 4, 5, dtype=F64)
    assert torch.equal(adapted(x), linear(x)), "a new adapter changed the output"
    assert float(adapted.lora_A.detach().abs().max()) <= 5**-0.5
    nn.init.normal_(adapted.lora_B)
    dense = linear.weight + 3.0 * adapted.lora_B @ adapted.lora_A
    torch.testing.assert_close(adapted(x), F.linear(x, dense, linear.bias))
    plain = adapted.plain()
    assert type(plain) is nn.Linear
    assert torch.equal(plain(x), linear(x))
    adapted.merge()
    torch.testing.assert_close(adapted.plain()(x), F.linear(x, dense, linear.bias))
    assert plain.weight is linear.weight is adapted.weight
    assert "rank=2, scale=3.0" in repr(adapted)


def test_dropout_applies_only_to_the_adapters_input() -> None:
    adapted = LoRALinear(nn.Linear(64, 7), 64, 64.0, 0.5)
    with torch.no_grad():
        adapted.lora_A.copy_(torch.eye(64))
        adapted.lora_B.copy_(-adapted.weight)
    x = torch.randn(9, 64)
    torch.testing.assert_close(adapted.eval()(x), adapted.bias.expand(9, 7))
    lost = (adapted.train()(x) - adapted.bias) @ torch.linalg.pinv(adapted.weight.T)  # x - drop(x), projected
    onto = torch.linalg.pinv(adapted.weight) @ adapted.weight
    assert not torch.allclose(lost, x @ onto)
    assert not torch.allclose(lost, torch.zeros_like(lost))


def test_bfloat16_merge_is_rounded_once() -> None:
    adapted = LoRALinear(nn.Linear(16, 16, dtype=torch.bfloat16), 4, 4.0)
    nn.init.normal_(adapted.lora_B)
    exact = adapted.weight.double() + adapted.lora_B.double() @ adapted.lora_A.double()
    adapted.merge()
    assert torch.equal(adapted.weight, exact.float().bfloat16())


@both
@pytest.mark.parametrize("names", [(), ("up_proj",), ("down_proj",)])
@pytest.mark.parametrize("save", [{}, {"save": "input"}, {"save": "input", "chunk_tokens": 3}])
def test_block_with_adapters_equals_its_children(activation, names, save) -> None:
    block = with_adapters(FeedForward(6, 10, activation=activation, dtype=F64, **save), 0.0, *names)
    x = torch.randn(2, 4, 6, dtype=F64, requires_grad=True)
    assert block.explain(x).startswith("eager: ")
    for ours, theirs in zip(outcome(block, x), outcome(by_children(block), x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(block(x), by_children(block)(x))


@both
def test_new_adapter_leaves_outputs_bitwise_equal(activation: str) -> None:
    block = FeedForward(384, 512, activation=activation)
    x = torch.randn(64, 384)
    plain = block(x)
    for name, child in list(block.named_children()):
        setattr(block, name, LoRALinear(child.requires_grad_(False), 8, 16.0))
    assert torch.equal(block(x), plain)


@pytest.mark.parametrize("train", [False, True], ids=["frozen", "training"])
def test_saved_elements_equal_the_plain_blocks(train: bool) -> None:
    """With frozen weights, and with trainable weights."""
    block = with_adapters(FeedForward(6, 10, 0.1, activation="swiglu"), 0.1).requires_grad_(train)
    for name, parameter in block.named_parameters():
        parameter.requires_grad_(train or "lora" in name)
    x = torch.randn(7, 6, requires_grad=True)
    known = [x, *block.parameters()]
    assert kept_for_backward(lambda: block(x), known) == {torch.float32: 7 * 20, torch.int64: 4}
    assert "keeps 26 elements per token" in block.explain(x)
    other = kept_for_backward(lambda: by_children(block)(x), known)
    assert other[torch.float32] > 2 * 7 * 20


def test_autocast() -> None:
    """The error against float64 is at most twice the children's, in autocast's dtype."""
    block = with_adapters(FeedForward(64, 96, activation="swiglu"))
    x = torch.randn(32, 64, requires_grad=True)
    exact = outcome(by_children(block).double(), x.detach().double().requires_grad_())
    errors = []
    for each in (block, by_children(block)):
        with torch.autocast("cpu", torch.bfloat16):
            found = outcome(each, x)
        assert found[0].dtype == torch.bfloat16
        assert all(t.dtype == torch.float32 for t in found[1:])
        errors.append(
            [float((a - b).detach().norm() / b.detach().norm()) for a, b in zip(found, exact, strict=True)]
        )
    assert all(ours <= 2 * theirs + 2**-8 for ours, theirs in zip(*errors, strict=True))


def test_changed_adapters_call_the_children() -> None:
    x = torch.randn(3, 6)
    for change in (
        lambda block: block.up_proj.register_forward_hook(lambda *_: None),
        lambda block: block.down_proj.register_full_backward_hook(lambda *_: None),
        lambda block: setattr(block.up_proj, "forward", block.up_proj.forward),
        lambda block: setattr(block, "down_proj", nn.Sequential(block.down_proj)),
    ):
        block = with_adapters(FeedForward(6, 10, activation="swiglu"))
        expected = block(x)
        change(block)
        assert block.explain(x).startswith("children: ")
        torch.testing.assert_close(block(x), expected)
    with pytest.raises(ValueError, match=r"^x must be "):
        with_adapters(FeedForward(6, 10))(torch.randn(3, 5))


@both
@pytest.mark.parametrize("save", ["preact", "input"])
@pytest.mark.usefixtures("nothing_compiled")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_block_equals_and_saves_the_same(activation: str, save: str) -> None:
    block = with_adapters(FeedForward(6, 10, activation=activation, save=save, dtype=F64))
    x = torch.randn(7, 6, dtype=F64, requires_grad=True)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    parameters = [p for p in block.parameters() if p.requires_grad]
    y = compiled(x)
    ours = [y, *torch.autograd.grad(y.square().sum(), [x, *parameters])]
    for a, b in zip(ours, outcome(block, x), strict=True):
        torch.testing.assert_close(a, b)
    hidden = 0 if save == "input" else 20 if activation == "swiglu" else 10
    assert kept_for_backward(lambda: compiled(x), [*block.parameters()]) == {F64: 7 * (6 + hidden)}


def test_vmap() -> None:
    block = with_adapters(FeedForward(6, 10, activation="swiglu"))
    x = torch.randn(3, 6)
    torch.testing.assert_close(torch.func.vmap(block)(x[:, None])[:, 0], block(x))


def test_copies_and_pickles() -> None:
    block = with_adapters(FeedForward(6, 10))
    x = torch.randn(3, 6)
    for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert torch.equal(other(x), block(x))
        assert other.explain(x).startswith("eager: ")


def test_compiled_autograd() -> None:
    block = FeedForward(8, 16)
    for name in ("up_proj", "down_proj"):
        setattr(block, name, LoRALinear(getattr(block, name).requires_grad_(False), 2, 4.0, 0.0))
    with torch.no_grad():
        block.up_proj.lora_B.normal_()
    x, wanted = torch.randn(5, 8), [block.up_proj.lora_A, block.down_proj.lora_B]
    theirs = torch.autograd.grad(block(x).sum(), wanted)
    y = block(x).sum()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        y.backward()
    for parameter, grad in zip(wanted, theirs, strict=True):
        torch.testing.assert_close(parameter.grad, grad)


def test_float32_factors_beside_a_bfloat16_weight() -> None:
    linear = nn.Linear(6, 10, dtype=torch.bfloat16)
    adapted = LoRALinear(linear, 2, 4.0).requires_grad_(False)
    adapted.lora_A.data, adapted.lora_B.data = adapted.lora_A.float(), torch.randn(10, 2)
    block = FeedForward(6, 10, dtype=torch.bfloat16)
    block.up_proj = adapted
    x = torch.randn(4, 6, dtype=torch.bfloat16)
    assert adapted(x).dtype == torch.bfloat16
    torch.testing.assert_close(block(x), by_children(block)(x), rtol=0.02, atol=0.02)
