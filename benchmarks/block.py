"""FeedForward beside the same block of plain torch modules: training (forward and backward) and inference.

python -m benchmarks block                         every case
python -m benchmarks block --cases 768/3072 --tokens 512 --modes float32 --rounds 5

`error` is the largest deviation from the textbook in float64 with dropout off, over the largest output.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.report import arguments, publish
from benchmarks.timing import comparison, measure, saved_bytes

MODES = ("float32", "autocast", "bfloat16")  # autocast: float32 weights and input under bfloat16 autocast
WORK = ("training", "inference")
COLUMNS = ["case", "tokens", "mode", "dropout", "work", "implementation"]
COLUMNS += ["ms", "iqr", "speedup", "low", "high", "saved_MB", "error"]


class Shape(NamedTuple):
    dim: int
    hidden_dim: int
    activation: str


SHAPES = {
    "256/1024": Shape(256, 1024, "gelu"),
    "768/3072": Shape(768, 3072, "gelu"),
    "896/4864": Shape(896, 4864, "swiglu"),
}


@dataclass(frozen=True)
class Case:
    name: str
    tokens: int
    mode: str
    dropout: float

    @property
    def shape(self) -> Shape:
        return SHAPES[self.name]

    def autocast(self):
        return torch.autocast("cpu", torch.bfloat16) if self.mode == "autocast" else nullcontext()


class Plain(nn.Module):
    """The block as one writes it: stock Linear, GELU or SiLU, Dropout."""

    def __init__(self, dim: int, hidden_dim: int, activation: str, dropout: float, bias: bool = True):
        super().__init__()
        self.gated = activation == "swiglu"
        if self.gated:
            self.gate_proj = nn.Linear(dim, hidden_dim, bias)
        self.up_proj = nn.Linear(dim, hidden_dim, bias)
        self.down_proj = nn.Linear(hidden_dim, dim, bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.gate_proj(x)) * self.up_proj(x) if self.gated else F.gelu(self.up_proj(x))
        return self.down_proj(self.dropout(h))


def build_torch(case: Case) -> nn.Module:
    return Plain(*case.shape, case.dropout)


def build_compiled(case: Case) -> nn.Module:
    module = build_torch(case)
    module.compile()
    return module


def build_ffn(case: Case, save: str = "preact") -> nn.Module:
    from ffn import FeedForward

    dim, hidden_dim, activation = case.shape
    return FeedForward(dim, hidden_dim, case.dropout, activation=activation, save=save)


def build_packed(case: Case) -> nn.Module:
    from ffn import pack

    return pack(build_ffn(case))


IMPLEMENTATIONS: dict[str, Callable[[Case], nn.Module]] = {
    "torch": build_torch,
    "torch.compile": build_compiled,
    "ffn": build_ffn,
    "ffn save=input": partial(build_ffn, save="input"),
    "ffn packed": build_packed,
}


def work_of(module: nn.Module, case: Case, x: Tensor, dy: Tensor, work: str) -> Callable[[], object]:
    def training() -> None:
        module.zero_grad(set_to_none=True)
        x.grad = None
        with case.autocast():
            y = module(x)
        y.backward(dy.to(y.dtype))

    def inference() -> None:
        with torch.no_grad(), case.autocast():
            module(x)

    return training if work == "training" else inference


def forward_of(module: nn.Module, case: Case, x: Tensor) -> Tensor:
    with case.autocast():
        return module(x)


def error_of(module: nn.Module, case: Case, x: Tensor, exact: Tensor) -> float:
    was_training = module.training
    with torch.no_grad():
        y = forward_of(module.eval(), case, x).double()
    module.train(was_training)
    return ((y - exact).abs().max() / exact.abs().max()).item()


def run_case(case: Case, work: str, names: list[str], rounds: int) -> list[dict]:
    """One row an implementation, the first of the names being what the others are compared with."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if case.mode == "bfloat16" else torch.float32
    x = torch.randn(case.tokens, case.shape.dim).to(dtype).requires_grad_(work == "training")
    dy = torch.randn(case.tokens, case.shape.dim)
    weights = build_torch(case).to(dtype).state_dict()
    textbook = build_torch(case).double().eval()
    textbook.load_state_dict(weights)
    exact = textbook(x.detach().double()).detach()
    modules = {}
    for name in names:
        modules[name] = IMPLEMENTATIONS[name](case).to(dtype).train(work == "training")
        modules[name].load_state_dict(weights)
    seconds = measure({n: work_of(m, case, x, dy, work) for n, m in modules.items()}, rounds=rounds)
    rows = []
    for name, module in modules.items():
        row = {"case": case.name, "tokens": case.tokens, "mode": case.mode, "dropout": case.dropout}
        row |= {"work": work, "implementation": name} | comparison(seconds[names[0]], seconds[name])
        if work == "training":
            row["saved_MB"] = saved_bytes(partial(forward_of, module, case, x), module) / 1e6
        rows.append(row | {"error": error_of(module, case, x, exact)})
    return rows


def main(argv: list[str]) -> None:
    parser = arguments("block", __doc__)
    parser.add_argument("--cases", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=[512, 2048])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--dropout", nargs="+", type=float, default=[0.0, 0.1])
    parser.add_argument("--work", nargs="+", choices=WORK, default=list(WORK))
    parser.add_argument("--implementations", nargs="+", choices=IMPLEMENTATIONS, default=["torch", "ffn"])
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args(argv)
    rows = []
    for name in options.cases:
        for tokens in options.tokens:
            for mode in options.modes:
                for work in options.work:
                    for dropout in options.dropout if work == "training" else [0.0]:
                        case = Case(name, tokens, mode, dropout)
                        rows += run_case(case, work, options.implementations, options.rounds)
    publish("block", rows, COLUMNS, options.results)
