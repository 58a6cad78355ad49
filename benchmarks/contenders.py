"""Who takes part on a GPU: one builder each, over the same weights, importing what it measures when called.

A builder that cannot serve a case raises, and the row says why.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.block import Plain
from benchmarks.report import version
from ffn.ops.kernels import tilings
from ffn.ops.kernels.tilings import Tiling


@dataclass(frozen=True)
class Case:
    """A block and what it is put to: work is "training" (forward and backward) or "decoding" (forward)."""

    name: str
    dim: int
    hidden_dim: int
    activation: str
    tokens: int
    dropout: float = 0.0
    bias: bool = False
    work: str = "training"
    backend: str = "auto"  # ffn's

    @property
    def gated(self) -> bool:
        return self.activation == "swiglu"


Weights = dict[str, Tensor]  # by the names of Plain's parameters


class Contender(NamedTuple):
    """A block ready to run. Gradients go by the names of Plain's parameters; it runs inside `setting()`."""

    module: nn.Module
    gradients: Callable[[], Weights]
    setting: Callable[[], AbstractContextManager] = nullcontext
    note: str = ""


@contextmanager
def pinned(choose: Callable[..., Tiling | None]) -> Iterator[None]:
    """Within it `choose` decides, in place of the table, which products ffn's kernels fuse."""
    kept = tilings.choose
    tilings.choose = choose
    try:
        yield
    finally:
        tilings.choose = kept


def never(*key) -> None:
    """Fuse no product."""


def always(forward: bool, capability: tuple[int, int], dtype: str, gated: bool, *sizes: int) -> Tiling | None:
    """Fuse both products, in the tiles that serve off the table."""
    return tilings.DEFAULTS.get(capability[0], {}).get((forward, gated))


def loaded(module: nn.Module, weights: Weights) -> Contender:
    """A block whose parameters have Plain's names, with these weights."""
    module.to(weights["up_proj.weight"]).load_state_dict(weights)
    return Contender(module, lambda: {name: p.grad for name, p in module.named_parameters()})


def build_torch(case: Case, weights: Weights) -> Contender:
    plain = Plain(case.dim, case.hidden_dim, case.activation, case.dropout, case.bias)
    return loaded(plain, weights)


def build_compiled(case: Case, weights: Weights, mode: str | None) -> Contender:
    contender = build_torch(case, weights)
    contender.module.compile(dynamic=False, mode=mode)
    return contender


def build_liger(case: Case, weights: Weights) -> Contender:
    if not case.gated:
        raise ValueError("has no erf GELU with a bias")
    from liger_kernel.transformers import LigerSwiGLUMLP

    sizes = {"hidden_size": case.dim, "intermediate_size": case.hidden_dim}
    module = LigerSwiGLUMLP(SimpleNamespace(**sizes, hidden_act="silu"))
    return loaded(module, weights)._replace(note=version("liger-kernel"))


def build_quack(case: Case, weights: Weights, tuned: bool) -> Contender:
    if not case.gated:
        raise ValueError("has no erf GELU, and falls back to torch where a bias is trained")
    from quack.mlp import MLP

    up = weights["up_proj.weight"]
    module = MLP(case.dim, case.hidden_dim, activation="swiglu", tuned=tuned).to(up)
    with torch.no_grad():  # the rows of gate and up take turns
        module.fc1.weight.copy_(torch.stack([weights["gate_proj.weight"], up], 1).flatten(0, 1))
        module.fc2.weight.copy_(weights["down_proj.weight"])

    def gradients() -> Weights:
        gate, up = module.fc1.weight.grad.unflatten(0, (-1, 2)).unbind(1)
        return {"gate_proj.weight": gate, "up_proj.weight": up, "down_proj.weight": module.fc2.weight.grad}

    return Contender(module, gradients, note=version("quack-kernels"))


def build_ffn(
    case: Case, weights: Weights, *, save: str = "preact", choose: Callable[..., Tiling | None] | None = None
) -> Contender:
    from ffn import FeedForward

    options = {"activation": case.activation, "bias": case.bias, "save": save, "backend": case.backend}
    module = FeedForward(case.dim, case.hidden_dim, case.dropout, **options)
    contender = loaded(module, weights)
    backend = module.explain(weights["up_proj.weight"]).partition(":")[0]
    setting = nullcontext if choose is None else partial(pinned, choose)
    return contender._replace(setting=setting, note=f"backend {backend}")


IMPLEMENTATIONS: dict[str, Callable[[Case, Weights], Contender]] = {
    "torch": build_torch,
    "torch.compile": partial(build_compiled, mode=None),
    "torch max-autotune": partial(build_compiled, mode="max-autotune-no-cudagraphs"),
    "liger": build_liger,
    "quack": partial(build_quack, tuned=False),
    "quack tuned": partial(build_quack, tuned=True),
    "ffn": build_ffn,
    "ffn unfused": partial(build_ffn, choose=never),
    "ffn fused": partial(build_ffn, choose=always),
    "ffn save=input": partial(build_ffn, save="input"),
}
