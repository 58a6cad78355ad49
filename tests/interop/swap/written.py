"""Modules with a given function as forward, and the chains found in them."""

from torch import Tensor, nn

from ffn.interop.swap.source import Chain, find_chains


class Block(nn.Module):
    """Has the children that the forwards in the tests use."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("fc1", "fc3"):
            setattr(self, name, nn.Linear(4, 6))
        self.fc2, self.wide, self.norm = nn.Linear(6, 4), nn.Linear(4, 12), nn.LayerNorm(4)
        self.act, self.dropout, self.flag = nn.GELU(), nn.Dropout(0.1), True
        self.ms: list[Tensor] = []
        self.double().eval()


PRODUCTS = {"fc1", "fc2", "fc3", "wide"}


def block(forward, **attributes) -> nn.Module:
    """Return an instance of a new class with this forward."""
    module = type("Made", (Block,), {"forward": forward})()
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


def chains(module: nn.Module, holders: frozenset = frozenset()) -> list[Chain]:
    return find_chains(module, PRODUCTS & dict(module.named_children()).keys(), set(holders))
