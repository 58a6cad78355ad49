"""The block in plain torch modules, the contender type for all implementations, and the timed calls."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.cases import Case
from ffn.activations import GATES

Weights = dict[str, Tensor]  # keyed by the names of Plain's parameters
META = torch.device("meta")  # device of modules that get their weights later

MODULES: dict[str, Callable[[], nn.Module]] = {
    "identity": nn.Identity,
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "gelu": nn.GELU,
    "gelu_tanh": partial(nn.GELU, approximate="tanh"),
    "silu": nn.SiLU,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "mish": nn.Mish,
    "softplus": nn.Softplus,
}


def act_of(activation: str) -> nn.Module:
    """Return torch's module for an activation; for a gated one, that of the gate."""
    name = GATES.get(activation, activation)
    if name not in MODULES:
        raise ValueError(f"torch.nn has no {name}")
    return MODULES[name]()


class Plain(nn.Module):
    """The block in stock modules: Linear, activation, Dropout."""

    def __init__(self, dim: int, hidden_dim: int, activation: str, dropout: float = 0.0, bias: bool = True):
        super().__init__()
        self.gated = activation in GATES
        if self.gated:
            self.gate_proj = nn.Linear(dim, hidden_dim, bias)
        self.up_proj = nn.Linear(dim, hidden_dim, bias)
        self.act = act_of(activation)
        self.dropout = nn.Dropout(dropout)
        self.down_proj = nn.Linear(hidden_dim, dim, bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.gate_proj(x)) * self.up_proj(x) if self.gated else self.act(self.up_proj(x))
        return self.down_proj(self.dropout(h))


class Contender(NamedTuple):
    """A block ready to run inside `setting()`, with gradients keyed by the names of Plain's parameters."""

    module: nn.Module
    gradients: Callable[[], Weights]
    setting: Callable[[], AbstractContextManager] = nullcontext
    note: str = ""


def loaded(
    module: nn.Module, state: Weights, plainly: Callable[[Weights], Weights] = dict, note: str = ""
) -> Contender:
    """Return the module with copies of these parameters; `plainly` converts gradients to Plain's layout.

    Copies make sure that no block finds its weights in the cache because another block has just read them.
    """
    copies = {name: w.clone(memory_format=torch.contiguous_format) for name, w in state.items()}
    module.load_state_dict(copies, assign=True)

    def gradients() -> Weights:
        return plainly({name: p.grad for name, p in module.named_parameters()})

    return Contender(module, gradients, note=note)


def build_torch(case: Case, weights: Weights) -> Contender:
    block = case.block
    with META:
        plain = Plain(block.dim, block.hidden_dim, block.activation, case.dropout, block.bias)
    return loaded(plain, weights)


def build_compiled(case: Case, weights: Weights, mode: str | None = None) -> Contender:
    contender = build_torch(case, weights)
    contender.module.compile(dynamic=False, mode=mode)
    return contender


def set_up(case: Case, device: torch.device) -> tuple[Weights, Tensor, Tensor]:
    """Return (weights, x, dy), the same for every implementation."""
    torch.manual_seed(0)
    block = case.block
    with device:
        plain = Plain(block.dim, block.hidden_dim, block.activation, 0.0, block.bias)
        x, dy = torch.randn(2, case.tokens, block.dim).to(case.element).unbind()
    weights = {name: w.to(case.element) for name, w in plain.state_dict().items()}
    return weights, x.clone().requires_grad_(case.work == "training"), dy.clone()


def training(case: Case, contender: Contender, x: Tensor, dy: Tensor) -> Tensor:
    """Run forward and backward; return the output and leave gradients in the parameters and in x."""
    contender.module.zero_grad(set_to_none=True)
    x.grad = None
    with contender.setting():
        with case.autocast(x.device):
            y = contender.module(x)
        y.backward(dy.to(y.dtype))
    return y.detach()


def inference(case: Case, contender: Contender, x: Tensor) -> Tensor:
    with torch.no_grad(), contender.setting(), case.autocast(x.device):
        return contender.module(x)
