"""probe: the code between two products is identified by its numbers, and nothing is changed."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ffn import activations
from ffn.interop.swap.plain_modules import PACKINGS
from ffn.interop.swap.probe import Inner, identify, sizes
from ffn.interop.swap.standin import StandIn
from tests.interop.swap.probed import Block, drops, found, gated, seen
from tests.interop.swap.same import F64

PLAIN = {name: row for name, row in activations.TABLE.items() if not row.gated}
GATED = {name: PLAIN[plain] for name, plain in activations.GATES.items()}


def swapped_gate(self, x):
    self.fc2(self.fc1(x) * self.act(self.fc3(x)))


def packed(packing: str):
    def chain(self, x):
        pair = self.fc1(x)
        a, b = (pair[..., ::2], pair[..., 1::2]) if packing == "interleaved" else pair.chunk(2, -1)
        self.fc2(a * self.act(b) if packing == "gate_last" else self.act(a) * b)

    return chain


@pytest.mark.parametrize("name", PLAIN)
def test_every_plain_activation_is_identified(name: str) -> None:
    inner = seen(Block(partial(PLAIN[name])))
    assert (inner.activation, inner.gate, inner.packing, inner.dropout) == (name, None, None, None)


@pytest.mark.parametrize("name", GATED)
@pytest.mark.parametrize("gate", [0, 1])
def test_every_gated_activation_is_identified_with_its_gate(name: str, gate: int) -> None:
    inner = seen(Block(partial(GATED[name])), (gated, swapped_gate)[gate], ("fc1", "fc3"))
    assert inner.activation == name
    assert inner.gate == gate or name == "bilinear"  # where both are the same
    assert inner.packing is None


@pytest.mark.parametrize("name", GATED)
@pytest.mark.parametrize("packing", PACKINGS)
def test_every_packing_is_identified(name: str, packing: str) -> None:
    inner = seen(Block(partial(GATED[name]), first=20), packed(packing))
    assert (inner.activation, inner.gate) == (name, 0)
    assert inner.packing == packing or (name, packing) == ("bilinear", "gate_last")


WRITTEN = {
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / 2**0.5)),
    "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": lambda x: x * torch.sigmoid(x),
    "relu2": lambda x: torch.square(F.relu(x)),
    "relu": lambda x: F.relu_(x),
    "mish": lambda x: x * torch.tanh(F.softplus(x)),
    "identity": lambda x: x,
}


@pytest.mark.parametrize("name", WRITTEN)
def test_activations_written_by_hand_or_in_place_are_identified(name: str) -> None:
    assert seen(Block(WRITTEN[name])).activation == name


def test_in_place_and_nested_activation_modules_are_identified() -> None:
    assert seen(Block(nn.ReLU(inplace=True))).activation == "relu"
    assert seen(Block(nn.SiLU(inplace=True))).activation == "silu"
    assert seen(Block(nn.Sequential(nn.GELU(), nn.Identity()))).activation == "gelu"


def drops_by_number(self, x):
    self.fc2(F.dropout(self.act(self.fc1(x)), p=self.rate, training=self.training))


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5])
def test_dropout_is_found_with_the_attribute_of_its_rate(p: float) -> None:
    block = Block()
    block.drop = nn.Dropout(p)
    assert seen(block, drops).dropout == ("drop", "p")
    block.rate = p
    assert seen(block, drops_by_number).dropout == ((("", "rate")) if p else None)
    assert (("", "rate", p) in seen(block, drops_by_number).watched) == (p == 0.0)


def test_products_may_be_held_by_children() -> None:
    class Up(nn.Module):
        def __init__(self):
            super().__init__()
            self.dense, self.act, self.scale = nn.Linear(6, 10), nn.SiLU(), 1.0

        def forward(self, x):
            return self.act(self.dense(x)) * self.scale

    block = Block()
    block.up, block.down = Up(), nn.Sequential(nn.Linear(10, 6))
    inner = identify(block, lambda self, x: self.down(self.up(x)), ("up.dense",), "down.0")
    assert isinstance(inner, Inner)
    assert inner.activation == "silu"
    assert ("up", "scale", 1.0) in inner.watched
    assert {("up", Up), ("up.act", nn.SiLU), ("down", nn.Sequential)} <= set(inner.passed)


def test_attributes_that_the_code_reads_are_watched() -> None:
    class Act(nn.Module):
        power = 1

        def __init__(self):
            super().__init__()
            self.inner, self._scale = nn.Module(), 1.0
            self.inner.shift = 0.0

        def scaled(self, x):
            return x * self._scale

        def forward(self, x):
            return self.scaled(F.gelu(x)) ** self.power + self.inner.shift

    def chain(self, x):
        h = self.fc1(x)
        h = self.turn(h) if self.flag else h
        self.fc2(self.act(h))

    class Turning(Block):
        factor = 1.0

        def turn(self, h):
            return h * self.factor

    block = Turning(Act())
    block.flag = True
    watched = set(seen(block, chain).watched)
    assert watched >= {("", "flag", True), ("", "factor", 1.0), ("act", "_scale", 1.0), ("act", "power", 1)}
    assert ("act.inner", "shift", 0.0) in watched
    assert ("act", "approximate", "none") in seen(Block(nn.GELU())).watched
    assert ("", "act", F.gelu) in seen(Block(F.gelu)).watched


def test_probing_changes_nothing() -> None:
    class Watchful(nn.Linear):
        trained = 0

        def train(self, mode: bool = True):
            self.trained += 1
            return super().train(mode)

    block = Block(dtype=F64)
    block.drop = nn.Dropout(0.3)
    block.fc2 = Watchful(10, 5)
    block.train()
    block.act.eval()
    block.fc1.weight.grad = torch.ones_like(block.fc1.weight)
    before = copy.deepcopy(block.state_dict())
    flags, attributes = [m.training for m in block.modules()], [list(vars(m)) for m in block.modules()]
    state, trained = torch.get_rng_state(), block.fc2.trained
    with torch.no_grad():
        assert seen(block, drops).dropout == ("drop", "p")
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state)
    assert flags == [m.training for m in block.modules()]
    assert attributes == [list(vars(m)) for m in block.modules()]
    assert block.fc2.trained == trained, "its own train() may do more than set a flag"
    assert torch.equal(block.fc1.weight.grad, torch.ones_like(block.fc1.weight))
    assert all(p.grad is None for name, p in block.named_parameters() if name != "fc1.weight")
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())


def test_probing_calls_no_hooks() -> None:
    block, calls = Block(), []
    for module in block.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda *_: calls.append(1))
    found(block)
    assert calls == []


def test_weights_may_have_any_dtype_and_device() -> None:
    for dtype in (torch.bfloat16, torch.float16, F64):
        assert seen(Block(dtype=dtype)).activation == "gelu"
    assert seen(Block().to("meta")).activation == "gelu"


def test_large_widths_are_probed() -> None:
    block = Block()
    block.fc1, block.fc2 = nn.Linear(8, 5000, device="meta"), nn.Linear(5000, 8, device="meta")
    assert seen(block).activation == "gelu"


def test_sizes_of_products() -> None:
    class Conv1D(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.empty(3, 7))

    assert sizes(nn.Linear(3, 7)) == sizes(Conv1D()) == (3, 7)


def test_a_stand_in_behaves_like_its_module() -> None:
    stand_in = StandIn(nn.Sequential(nn.GELU(), nn.ReLU()), {}, {})
    assert isinstance(stand_in, nn.Sequential)
    assert [type(step) for step in stand_in] == [nn.GELU, nn.ReLU]
    assert torch.equal(stand_in(torch.ones(2)), F.gelu(torch.ones(2)))
