"""plain_parameters: a Linear with hooks, another forward or other parameters is not plain."""

import pytest
import torch
from torch import nn

from ffn.nn.plain import is_hooked, plain_parameters

HOOKS = {
    "register_forward_hook": lambda *_: None,
    "register_forward_pre_hook": lambda *_: None,
    "register_full_backward_hook": lambda *_: None,
    "register_full_backward_pre_hook": lambda *_: None,
}


@pytest.mark.parametrize("bias", [True, False])
def test_plain_linear_gives_its_two_parameters(bias: bool) -> None:
    linear = nn.Linear(3, 5, bias=bias)
    weight, found = plain_parameters(linear)
    assert weight is linear.weight
    assert found is linear.bias
    assert plain_parameters(None) is None
    assert plain_parameters(nn.Bilinear(3, 3, 5)) is None


@pytest.mark.parametrize("register", HOOKS)
def test_hooked_linear_is_not_plain_until_the_hook_is_removed(register: str) -> None:
    linear = nn.Linear(3, 5)
    handle = getattr(linear, register)(HOOKS[register])
    assert is_hooked(linear)
    assert plain_parameters(linear) is None
    handle.remove()
    assert not is_hooked(linear)
    assert plain_parameters(linear) is not None


def test_linear_with_another_forward_is_not_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    linear, own = nn.Linear(3, 5), nn.Linear(3, 5)
    own.forward = lambda x: x
    assert plain_parameters(own) is None
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: x)
    assert plain_parameters(linear) is None


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_linear_with_a_parameter_subclass_is_not_plain(name: str) -> None:
    class Other(nn.Parameter):
        pass

    linear = nn.Linear(3, 5)
    setattr(linear, name, Other(torch.zeros_like(getattr(linear, name))))
    assert plain_parameters(linear) is None
