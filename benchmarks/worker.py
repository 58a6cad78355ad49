"""What `base` gives its requests to: a process that builds and times cases over the `ffn` of one tree.

Started as a module with (ROOT, TABLE, DEVICE): ROOT holds the `ffn` to import, TABLE names the module with
IMPLEMENTATIONS. Requests and answers are lines of JSON on stdin and stdout.
"""

import json
import os
import sys
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from benchmarks.timing import Run, clock_of

TURN = 0.02  # seconds
SAMPLE = 1 << 20  # elements of an output that are compared


def drawn(case, device: torch.device) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """(weights, x, dy), the same in every process; the weights as torch.nn.Linear draws its own."""
    torch.manual_seed(0)
    block, weights = case.block, {}
    shapes = {"up_proj": (block.hidden_dim, block.dim), "down_proj": (block.dim, block.hidden_dim)}
    if block.gated:
        shapes["gate_proj"] = shapes["up_proj"]
    with device:
        for name, (rows, columns) in shapes.items():
            bound = columns**-0.5
            weights[f"{name}.weight"] = torch.empty(rows, columns).uniform_(-bound, bound).to(case.element)
            if block.bias:
                weights[f"{name}.bias"] = torch.empty(rows).uniform_(-bound, bound).to(case.element)
        x, dy = (torch.randn(case.tokens, block.dim).to(case.element) for _ in range(2))
    return weights, x.requires_grad_(case.work == "training"), dy


def work(contender, case, x: Tensor, dy: Tensor) -> Tensor:
    """The output; after training with the gradients left in the parameters and in x."""
    training = case.work == "training"
    contender.module.zero_grad(set_to_none=True)
    x.grad = None
    with torch.set_grad_enabled(training), contender.setting():
        with case.autocast(x.device):
            y = contender.module(x)
        if training:
            y.backward(dy.to(y.dtype))
    return y.detach()


def sample(tensor: Tensor) -> Tensor:
    flat = tensor.detach().flatten()
    return flat[:: flat.numel() // SAMPLE | 1].cpu().clone()  # an odd step meets every column of a matrix


class Bench:
    """One case at a time, ready to be timed."""

    def __init__(self, root: Path, table: str, device: str):
        self.root, self.table, self.device = root, table, torch.device(device)
        self.clock = clock_of(self.device)
        self.run: Run | None = None

    def prepare(self, case: dict, name: str, outputs: str) -> str:
        """The contender's note; what it computes without dropout goes to the file `outputs`."""
        self.run = None  # frees the case before
        import ffn

        assert Path(ffn.__file__).resolve().is_relative_to(self.root), f"ffn came from {ffn.__file__}"
        from benchmarks.cases import Block, Case

        case = Case(**{**case, "block": Block(**case["block"])})
        build = partial(self.build, import_module(self.table).IMPLEMENTATIONS[name])
        weights, x, dy = drawn(case, self.device)
        plain = replace(case, dropout=0.0)
        contender = build(plain, weights)
        found = {"y": work(contender, plain, x, dy)}
        if case.work == "training":
            found |= {"x": x.grad} | contender.gradients()
        torch.save({of: sample(tensor) for of, tensor in found.items()}, outputs)
        if case.dropout:
            contender = build(case, weights)
        self.run = partial(work, contender, case, x, dy)
        return contender.note

    def build(self, builder, case, weights: dict[str, Tensor]):
        with self.device:
            contender = builder(case, weights)
        contender.module.train(case.work == "training")
        return contender

    def seconds(self) -> float:
        """The median of as many calls as make a turn: after a pause the first is slower than the others."""
        assert self.run is not None, "no case is prepared"
        seen = [self.clock(self.run)]
        while sum(seen) < TURN:
            seen.append(self.clock(self.run))
        return median(seen)


def main(root: str, table: str, device: str) -> None:
    sys.path.insert(0, root)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever is printed must not come between the answers
    bench = Bench(Path(root).resolve(), table, device)
    for line in sys.stdin:
        what, *details = json.loads(line)
        try:
            answer = {"answer": getattr(bench, what)(*details)}
        except Exception as error:  # noqa: BLE001 another commit may fail in any way; the row says how
            answer = {"error": f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:120]}
        print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    main(*sys.argv[1:])
