"""swap leaves code alone that is almost a block, and reports the reason."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ffn
from tests.interop.swap.blocks import ODD_WEIGHTS, TORCHS_OWN, sequential
from tests.interop.swap.same import F64
from tests.interop.swap.test_probe_refused import Straight, clamped_in_half

pytestmark = TORCHS_OWN


class Almost(nn.Module):
    def __init__(self, act):
        super().__init__()
        self.fc1, self.fc3, self.fc2 = nn.Linear(6, 10), nn.Linear(6, 10), nn.Linear(10, 6)
        self.act = act
        self.register_buffer("one", torch.ones(()))
        self.double()


def residual(self, x):
    return self.fc2(self.act(self.fc1(x)) + x[..., :1])


def value_used_twice(self, x):
    h = self.act(self.fc1(x))
    return self.fc2(h) + h.sum()


def clamped(self, x):
    return self.fc2(self.act(self.fc1(x)).clamp(-7, 7))


def gate_multiplied(self, x):
    return self.fc2(F.silu(self.fc1(x) * 1.0001) * self.fc3(x))


def up_multiplied(self, x):
    return self.fc2(F.silu(self.fc1(x)) * (self.fc3(x) * 1.0001))


def normed_between(self, x):
    return self.fc2(F.layer_norm(self.act(self.fc1(x)), (10,)))


def masked_by_x(self, x):
    return self.fc2(self.act(self.fc1(x)) * (x[..., :1] > 100))


def times_a_buffer(self, x):
    return self.fc2(self.act(self.fc1(x)) * self.one)


def transposed(self, x):
    return self.fc2(self.act(self.fc1(x)).transpose(-1, -2).transpose(-1, -2).flip(-1))


def tokens_mixed(self, x):
    return self.fc2(self.act(self.fc1(x)).cumsum(1))


def straight(self, x):
    return self.fc2(self.act(self.fc1(x)))


def named_within(self, x):
    h = x.mean()
    y = self.fc2(F.gelu(h := self.fc1(x)))
    return y + h.mean()


def nan_made_a_number(self, x):
    return self.fc2(torch.nan_to_num(self.act(self.fc1(x))))


def no_grad_between(self, x):
    return self.fc2(self.act(self.fc1(x).detach()))


def tanh_labelled_gelu(x):
    return F.gelu(x) + 5e-4 * torch.tanh(x)


tanh_labelled_gelu.__name__ = "gelu"
NO_CHAIN = "its source is not available"
NO_ROW = "no activation of the table"
ALMOST = {
    "residual": (residual, F.gelu, NO_CHAIN),
    "used twice": (value_used_twice, F.gelu, NO_CHAIN),
    "clamp": (clamped, F.gelu, NO_ROW),
    "gate": (gate_multiplied, F.gelu, NO_ROW),
    "up": (up_multiplied, F.gelu, NO_ROW),
    "norm": (normed_between, F.gelu, NO_ROW),
    "mask": (masked_by_x, F.gelu, NO_CHAIN),
    "flip": (transposed, F.gelu, NO_ROW),
    "tokens": (tokens_mixed, F.gelu, NO_ROW),
    "walrus": (named_within, F.gelu, NO_CHAIN),
    "nan": (nan_made_a_number, F.gelu, "in float64, for one token"),
    "detach": (no_grad_between, F.gelu, "the last product does not depend on the first"),
    "buffer": (times_a_buffer, F.gelu, "one takes part between the products"),
    "label": (straight, tanh_labelled_gelu, NO_ROW),
    "far": (straight, lambda x: torch.where(x > 100, x * 1.01, F.gelu(x)), NO_ROW),
    "shift": (straight, lambda x: F.gelu(x) + 1e-6, NO_ROW),
    "slope": (straight, Straight.apply, NO_ROW),
    "dtype": (straight, clamped_in_half, "in float16"),
}


def almost(name: str) -> nn.Module:
    forward, act, _ = ALMOST[name]
    return type("Almost", (Almost,), {"forward": forward})(act)


@pytest.mark.parametrize("name", ALMOST)
def test_almost_a_block_is_left_alone_with_its_reason(name: str) -> None:
    model = almost(name)
    expected, cls = numbers_of(model), type(model)
    (block,) = ffn.swap(model)
    assert block.action == "left"
    assert block.reason.startswith(ALMOST[name][2])
    assert type(model) is cls
    for found, wanted in zip(numbers_of(model).values(), expected.values(), strict=True):
        assert torch.equal(found, wanted)


def numbers_of(model: nn.Module) -> dict[str, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 6, dtype=F64, requires_grad=True)
    y = model(x)
    return {"y": y.detach(), "fc2": torch.autograd.grad(y.sum(), model.fc2.weight)[0]}


@pytest.mark.parametrize("after", [nn.Tanh(), nn.Dropout(0.5)], ids=["tanh", "dropout"])
def test_a_child_that_computes_after_the_last_product_is_left_alone(after: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(6, 10), nn.GELU(), nn.Sequential(nn.Linear(10, 6), after)).double()
    (block,) = ffn.swap(model)
    assert (block.action, block.reason) == ("left", "the forward of 2 does not begin with its product")


@pytest.mark.parametrize("name", ODD_WEIGHTS)
def test_a_block_with_odd_weights_is_left_and_the_others_are_swapped(name: str) -> None:
    make, reason = ODD_WEIGHTS[name]
    odd, other = ffn.swap(nn.ModuleList([make(), sequential()]))
    assert (odd.action, other.action) == ("left", "swapped")
    assert reason in odd.reason


def test_a_parametrized_block_is_left_with_its_state() -> None:
    linear = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 10))
    state = {key: value.clone() for key, value in linear.state_dict().items()}
    (block,) = ffn.swap(nn.Sequential(linear, nn.GELU(), nn.Linear(10, 6)))
    assert block.action == "left"
    assert all(torch.equal(value, state[key]) for key, value in linear.state_dict().items())
