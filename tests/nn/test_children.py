"""Any change to a child Linear of the block takes effect, since the block then calls its children."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune
from torch.nn.utils.parametrizations import weight_norm

from ffn.activations import TABLE
from ffn.nn import FeedForward

F64 = torch.float64


class LoRA(nn.Module):
    """y = base x + B A x: an adapter that wraps a Linear."""

    def __init__(self, base: nn.Linear, rank: int = 2):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False, dtype=F64)
        self.up = nn.Linear(rank, base.out_features, bias=False, dtype=F64)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class Doubled(Tensor):
    """A weight that F.linear counts twice: a minimal stand-in for a quantized weight."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        out = super().__torch_function__(func, types, args, kwargs or {})
        return 2.0 * out.as_subclass(Tensor) if func is F.linear else out


class Twice(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2.0 * weight


class LoudLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2.0 * super().forward(x)


class CalledTwice(nn.Linear):
    def __call__(self, x: Tensor) -> Tensor:
        return 2.0 * super().__call__(x)


def replace_forward(block: FeedForward, child: str) -> None:
    linear = getattr(block, child)
    original = linear.forward
    linear.forward = lambda x: 2.0 * original(x)


def wrap(block: FeedForward, child: str) -> None:
    adapter = LoRA(getattr(block, child))
    adapter.up.weight.data.copy_(torch.randn_like(adapter.up.weight))
    setattr(block, child, adapter)


def subclass_weight(block: FeedForward, child: str) -> None:
    linear = getattr(block, child)
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Doubled))


def parametrized(block: FeedForward, child: str) -> None:
    parametrize.register_parametrization(getattr(block, child), "weight", Twice())


def normed(block: FeedForward, child: str) -> None:
    weight_norm(getattr(block, child))
    getattr(block, child).parametrizations.weight.original0.data.mul_(2.0)


def pruned(block: FeedForward, child: str) -> None:
    prune.random_unstructured(getattr(block, child), "weight", 0.5)


def subclass(block: FeedForward, child: str) -> None:
    old = getattr(block, child)
    new = LoudLinear(old.in_features, old.out_features, dtype=F64)
    new.load_state_dict(old.state_dict())
    setattr(block, child, new)


def called_otherwise(block: FeedForward, child: str) -> None:
    getattr(block, child).__class__ = CalledTwice


def pre_hooked(block: FeedForward, child: str) -> None:
    getattr(block, child).register_forward_pre_hook(lambda module, args: (2.0 * args[0],))


def hooked(block: FeedForward, child: str) -> None:
    getattr(block, child).register_forward_hook(lambda module, args, y: 2.0 * y)


def hooked_with_keywords(block: FeedForward, child: str) -> None:
    getattr(block, child).register_forward_hook(lambda module, args, kwargs, y: 2.0 * y, with_kwargs=True)


CHANGES = [replace_forward, wrap, subclass_weight, parametrized, normed, pruned, subclass, called_otherwise,
           pre_hooked, hooked, hooked_with_keywords]  # fmt: skip


def written_out(block: FeedForward, x: Tensor) -> Tensor:
    row = TABLE[block.activation]
    pre = block.up_proj(x)
    return block.down_proj(row(block.gate_proj(x)) * pre if row.gated else row(pre))


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("child", ["gate_proj", "up_proj", "down_proj"])
def test_any_change_to_a_child_takes_effect(change, child: str) -> None:
    block = FeedForward(6, 10, activation="swiglu", dtype=F64)
    x = torch.randn(3, 6, dtype=F64, requires_grad=True)
    before = block(x)
    change(block, child)
    line = block.explain(x)
    assert line.startswith(f"children: {child} (a {type(getattr(block, child)).__name__}) is replaced")
    assert "\n" not in line
    y = block(x)
    assert not torch.allclose(y, before)
    torch.testing.assert_close(y, written_out(block, x))
    wanted = [p for p in block.parameters() if p.requires_grad]
    grads = torch.autograd.grad(y.square().sum(), [x, *wanted])
    torch.testing.assert_close(grads, torch.autograd.grad(written_out(block, x).square().sum(), [x, *wanted]))


def test_removing_a_hook_restores_the_fused_path() -> None:
    block, x = FeedForward(6, 10), torch.randn(3, 6)
    assert block.explain(x).startswith("eager: ")
    handle = block.down_proj.register_forward_hook(lambda *_: None)
    assert block.explain(x).startswith("children: down_proj (a Linear) is ")
    handle.remove()
    assert block.explain(x).startswith("eager: ")
    block.up_proj = None
    assert block.explain(x).startswith("children: up_proj (a NoneType) is replaced")


def test_explain_names_options_without_effect() -> None:
    block, x = FeedForward(6, 10, save="input"), torch.randn(3, 6)
    block.up_proj.register_forward_hook(lambda *_: None)
    assert block.explain(x).endswith("; save='input' has no effect here")
    block.backend = "triton"
    for call in (block, block.explain):
        with pytest.raises(ValueError, match=r"^backend must be 'auto'.*up_proj"):
            call(x)


def test_missing_gate_raises() -> None:
    block = FeedForward(6, 10, activation="swiglu")
    block.gate_proj = None
    with pytest.raises(TypeError, match=r"^gate_proj must be a module"):
        block(torch.randn(3, 6))


@pytest.mark.parametrize("child", ["gate_proj", "up_proj", "down_proj"])
def test_hooks_fire(child: str) -> None:
    block, x = FeedForward(6, 10, activation="swiglu"), torch.randn(3, 6, requires_grad=True)
    linear, fired = getattr(block, child), []
    for register in ("forward_pre_hook", "forward_hook", "full_backward_pre_hook", "full_backward_hook"):
        handle = getattr(linear, f"register_{register}")(lambda *_, name=register: fired.append(name))
        block(x).sum().backward()
        assert fired == [register]
        handle.remove()
        fired.clear()
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: fired.append(module))
    block(x)
    handle.remove()
    assert linear in fired
    assert block.explain(x).startswith("eager: ")


def test_block_and_parameter_hooks_fire_on_the_fused_path() -> None:
    block, fired = FeedForward(6, 10), []
    block.register_forward_hook(lambda *_: fired.append("block"))
    block.up_proj.weight.register_hook(lambda grad: fired.append("weight"))
    block.down_proj.bias.register_post_accumulate_grad_hook(lambda p: fired.append("bias"))
    assert block.explain(torch.randn(3, 6)).startswith("eager: ")
    block(torch.randn(3, 6)).sum().backward()
    assert sorted(fired) == ["bias", "block", "weight"]


def test_input_subclasses_call_the_children() -> None:
    class Tagged(Tensor):
        pass

    block = FeedForward(6, 10, 0.5)
    x = torch.randn(3, 6).as_subclass(Tagged)
    assert block.explain(x) == "children: the input is a Tagged"
    assert type(block(x)) is Tagged


@pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning")
def test_nested_input_calls_the_children() -> None:
    block, parts = (
        FeedForward(6, 10, activation="swiglu", dtype=F64),
        [torch.randn(n, 6, dtype=F64) for n in (2, 3)],
    )
    nested = torch.nested.nested_tensor(parts)
    assert block.explain(nested) == "children: the input is nested"
    for found, part in zip(block(nested).unbind(), parts, strict=True):
        torch.testing.assert_close(found, block(part))


def test_patch_of_nn_linear_takes_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    block, x = FeedForward(4, 6), torch.randn(2, 4)
    plain = torch.nn.Linear.forward
    monkeypatch.setattr(torch.nn.Linear, "forward", lambda self, x: 2 * plain(self, x))
    assert "replaced" in block.explain(x)
    torch.testing.assert_close(
        block(x), 2 * plain(block.down_proj, torch.nn.functional.gelu(block.up_proj(x)))
    )
