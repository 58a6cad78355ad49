"""A module with three products for a given function to join, and the result of `identify`."""

import torch
from torch import nn

from ffn.interop.swap.probe import Inner, identify


class Block(nn.Module):
    def __init__(self, act=None, first: int = 10, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.fc1, self.fc3 = nn.Linear(6, first, dtype=dtype), nn.Linear(6, 10, dtype=dtype)
        self.fc2 = nn.Linear(10, 5, dtype=dtype)
        self.act = act or nn.GELU()


def plain(self, x):
    self.fc2(self.act(self.fc1(x)))


def gated(self, x):
    self.fc2(self.act(self.fc1(x)) * self.fc3(x))


def found(block: nn.Module, chain=plain, first: tuple[str, ...] = ("fc1",), last: str = "fc2") -> Inner | str:
    return identify(block, chain, first, last)


def seen(block: nn.Module, chain=plain, first: tuple[str, ...] = ("fc1",)) -> Inner:
    inner = found(block, chain, first)
    assert isinstance(inner, Inner), inner
    return inner


def refused(block: nn.Module, chain=plain, first: tuple[str, ...] = ("fc1",)) -> str:
    inner = found(block, chain, first)
    assert isinstance(inner, str), inner
    return inner


def drops(self, x):
    self.fc2(self.drop(self.act(self.fc1(x))))
