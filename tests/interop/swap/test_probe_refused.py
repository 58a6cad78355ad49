"""probe: code between two products is refused if it is no known activation, or may change unseen."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.interop.swap.probed import Block, drops, refused
from tests.interop.swap.same import F64


class Learned(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.ones((), dtype=F64))

    def forward(self, x):
        return F.gelu(x) * self.a


class Buffered(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("a", torch.ones((), dtype=F64))

    def forward(self, x):
        return F.gelu(x) * self.a


class Held(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = [1.0]

    def forward(self, x):
        return F.gelu(x) * self.a[0]


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.n = 0

    def forward(self, x):
        self.n += 1
        return F.gelu(x)


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return F.relu(x)

    @staticmethod
    def backward(ctx, dy):
        return dy


def top_k(x: Tensor) -> Tensor:
    return F.relu(x) * (x >= x.topk(x.shape[-1] // 2, -1).values[..., -1:])


def upto(x: Tensor) -> Tensor:
    return torch.where(x > 100, 100 + (x - 100) * 1.001, F.relu(x))


def clamped_in_half(x: Tensor) -> Tensor:
    h = F.gelu(x)
    return h.clamp(-64504, 64504) if h.dtype == torch.float16 else h


def other_alone(x: Tensor) -> Tensor:
    return F.silu(x) if x.shape[-2] == 1 else F.gelu(x)


UNKNOWN = {
    "tanh for erf": lambda x: F.gelu(x, approximate="tanh") + 0 * F.gelu(x) * 1e-9 + 1e-6 * x,
    "clamp": lambda x: F.gelu(x).clamp(-7, 7),
    "clamp far out": lambda x: x.clamp(max=5000) * torch.sigmoid(x),
    "multiplier": lambda x: 1.0001 * F.gelu(x),
    "shift": lambda x: F.gelu(x) + 1e-6,
    "norm": lambda x: F.layer_norm(F.gelu(x), x.shape[-1:]),
    "sparsity": top_k,
    "another beyond 100": upto,
    "another row": nn.ELU(),
    "slope of leaky relu": nn.LeakyReLU(0.02),
    "softmax": lambda x: torch.softmax(x, -1),
    "float32": lambda x: F.gelu(x.float()).to(x.dtype),
    "straight through": Straight.apply,
    "detached": lambda x: F.gelu(x.detach()),
    "partly detached": lambda x: F.relu(x).detach() + 0 * x,
    "a constant": lambda x: torch.ones_like(x),
}
TAKES_PART = {
    "learned": (Learned(), "act.a"),
    "a torch.nn module with weights": (nn.PReLU(), "act.weight"),
    "buffer": (Buffered(), "act.a"),
    "a container": (Held(), "act.a"),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_almost_an_activation_is_refused(name: str) -> None:
    reason = refused(Block(UNKNOWN[name]))
    assert reason.startswith(("no activation of the table gives its values", "the last product does not")), (
        reason
    )


@pytest.mark.parametrize("name", TAKES_PART)
def test_state_between_the_products_is_refused_by_name(name: str) -> None:
    act, path = TAKES_PART[name]
    assert path in refused(Block(act))


@pytest.mark.parametrize("act", [clamped_in_half, lambda x: F.gelu(x) if x.dtype == F64 else F.relu(x)])
def test_other_values_in_other_dtypes_are_refused(act) -> None:
    assert refused(Block(act)).startswith("in float")


def test_other_values_for_a_single_token_are_refused() -> None:
    assert refused(Block(other_alone)).startswith("in float64, for one token")


@pytest.mark.parametrize(
    "chain",
    [
        lambda self, x: self.fc2(self.act(self.fc1(x)) * (1.0001 * self.fc3(x))),
        lambda self, x: self.fc2(self.act(self.fc1(x)) * (self.fc3(x) + 1)),
        lambda self, x: self.fc2(self.act(self.fc1(x)).clamp(max=7) * self.fc3(x).clamp(-7, 7)),
        lambda self, x: self.fc2(self.act(self.fc1(x)) + self.fc3(x)),
        lambda self, x: self.fc2(self.act(self.fc1(x))),
    ],
)
def test_almost_gated_is_refused(chain) -> None:
    refused(Block(nn.SiLU()), chain, ("fc1", "fc3"))


def test_code_that_fails_or_writes_is_refused() -> None:
    assert "cannot be probed (ZeroDivisionError" in refused(Block(lambda x: x / (1 // 0)))
    counting = Counting()
    assert "it writes n" in refused(Block(counting))
    assert counting.n == 0
    assert "ValueError: 'the last product was not reached'" in refused(Block(), lambda self, x: self.fc1(x))
    assert "shape" in refused(Block(), lambda self, x: self.fc2(self.fc1(x)[..., :5]))

    class OwnCall(nn.Module):
        def forward(self, x):
            return F.gelu(x)

        def __call__(self, x):
            return super().__call__(x) * 2

    assert "its own __call__" in refused(Block(OwnCall()))
    block = Block()
    block.other = Block()
    block.method = block.other.act.forward
    assert refused(block, lambda self, x: self.fc2(self.method(self.fc1(x)))).startswith("method takes part")


class Noise(nn.Module):
    def forward(self, x):
        return x + torch.rand_like(x) if self.training else x


class Scaled(nn.Module):
    def forward(self, x):
        return F.dropout(x, 0.5, self.training) * 0.5


class Detached(nn.Module):
    def forward(self, x):
        return x.detach() if self.training else x


DROPS = {
    "noise": (Noise(), "in training mode"),
    "not scaled": (Scaled(), "no activation of the table"),
    "channels": (nn.Dropout1d(0.5), "in training mode"),
    "always": (partial(F.dropout, p=0.5, training=True), "no activation"),
    "detached in training": (Detached(), "in training mode"),
    "feature alpha": (nn.AlphaDropout(0.5), "in training mode"),
    "everything": (nn.Dropout(1.0), "its dropout rate is 1"),
    "two": (nn.Sequential(nn.Dropout(0.2), nn.Dropout(0.3)), "it drops 0.44 of its values"),
}


@pytest.mark.parametrize("name", DROPS)
def test_dropouts_of_another_kind_are_refused(name: str) -> None:
    block, (drop, reason) = Block(), DROPS[name]
    block.drop = drop
    assert refused(block, drops).startswith(reason)


def test_a_rate_held_by_two_attributes_is_refused() -> None:
    block = Block()
    block.rate = block.other = 0.25
    chain = lambda self, x: self.fc2(  # noqa: E731
        F.dropout(self.act(self.fc1(x)), self.rate if self.other else 0, self.training)
    )
    assert refused(block, chain).startswith("it drops 0.25 of its values")
