"""Hand-written feed-forward blocks, and their swapped copies."""

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ffn
from ffn.interop.swap.reroute import Rerouted, reason_not_to
from tests.interop.swap.same import DYNAMOS_OWN, F64

# Deprecation warnings of torch 2.13 about its own jit, quantization and pruning.
TORCHS_OWN = [
    DYNAMOS_OWN,
    pytest.mark.filterwarnings(r"ignore:.*torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings(r"ignore:.*torch.ao.quantization:DeprecationWarning"),
    pytest.mark.filterwarnings(r"ignore:torch.quantize_per_tensor:UserWarning"),
]


class Gated(nn.Module):
    """A gated block in the middle of a layer, with a norm, a dropout and a multiplier."""

    def __init__(self, p: float = 0.0):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(6, 10), nn.Linear(6, 10), nn.Linear(10, 6)
        self.act, self.drop, self.norm = nn.SiLU(), nn.Dropout(p), nn.LayerNorm(6)
        self.scale = 1.0
        self.double()

    def forward(self, x):
        residual = x
        x = self.norm(x)
        x = self.down(self.drop(self.act(self.gate(x)) * self.up(x) * self.scale))
        return residual + x


class Plain(nn.Module):
    """A plain block with its dropout rate as a number."""

    def __init__(self, p: float = 0.0):
        super().__init__()
        self.fc1, self.fc2, self.act = nn.Linear(6, 10), nn.Linear(10, 6), F.gelu
        self.p = p
        self.double()

    def forward(self, x):
        return self.fc2(F.dropout(self.act(self.fc1(x)), self.p, self.training))


def sequential(p: float = 0.0) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 10), nn.GELU(), nn.Dropout(p), nn.Linear(10, 6)).double()


KINDS = {"gated": Gated, "plain": Plain, "sequential": sequential}
LINEARS = {"gated": ("gate", "up", "down"), "plain": ("fc1", "fc2"), "sequential": ("0", "3")}
kinds = pytest.mark.parametrize("kind", KINDS)


def rows() -> Tensor:
    return torch.randn(2, 3, 6, dtype=F64, generator=torch.Generator().manual_seed(7))


def swapped(model: nn.Module) -> nn.Module:
    report = ffn.swap(model)
    assert [block.action for block in report] == ["swapped"], str(report)
    return model


def pair(kind: str, p: float = 0.0) -> tuple[nn.Module, nn.Module]:
    """Return a block and its swapped copy."""
    old = KINDS[kind](p)
    return old, swapped(copy.deepcopy(old))


def runs_old(model: nn.Module) -> bool:
    """Return whether the swapped block runs its old code."""
    (block,) = (m for m in model.modules() if isinstance(m, Rerouted))
    return reason_not_to(block, block._ffn_plan) is not None


def odd_weights(hidden: int = 10, first=torch.float32, last=torch.float32) -> nn.Module:
    with warnings.catch_warnings(action="ignore"):  # torch warns about empty and complex weights
        return nn.Sequential(nn.Linear(6, hidden).to(first), nn.GELU(), nn.Linear(hidden, 6).to(last))


# name: (build, the reason to refuse it)
ODD_WEIGHTS = {
    "no hidden channels": (lambda: odd_weights(0), "a width of 0"),
    "two dtypes": (lambda: odd_weights(last=torch.bfloat16), "different dtypes"),
    "complex": (lambda: odd_weights(10, torch.complex64, torch.complex64), "torch.complex64"),
    "float8": (lambda: odd_weights(10, torch.float8_e4m3fn, torch.float8_e4m3fn), "torch.float8_e4m3fn"),
}
