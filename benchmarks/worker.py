"""The worker process of `base`: builds and times cases with the `ffn` of one tree.

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

from benchmarks.report import reason
from benchmarks.timing import Run, clock_of

TURN = 0.02  # seconds
SAMPLE = 1 << 20  # compared elements of an output


def sample(tensor: Tensor) -> Tensor:
    flat = tensor.detach().flatten()
    return flat[:: flat.numel() // SAMPLE | 1].cpu().clone()  # an odd step samples every column of a matrix


class Bench:
    """One case at a time, ready to be timed."""

    def __init__(self, root: Path, table: str, device: str):
        self.root, self.table, self.device = root, table, torch.device(device)
        self.clock = clock_of(self.device)
        self.run: Run | None = None

    def prepare(self, case: dict, name: str, outputs: str) -> str:
        """Write the outputs without dropout to the file `outputs`; return the contender's note."""
        self.run = None  # frees the previous case
        import ffn

        assert Path(ffn.__file__).resolve().is_relative_to(self.root), f"ffn came from {ffn.__file__}"
        from benchmarks.cases import Block, Case
        from benchmarks.plain import inference, set_up, training

        case = Case(**{**case, "block": Block(**case["block"])})
        build = partial(self.build, import_module(self.table).IMPLEMENTATIONS[name])
        weights, x, dy = set_up(case, self.device)
        work = partial(training, x=x, dy=dy) if case.trains else partial(inference, x=x)
        contender = build(replace(case, dropout=0.0), weights)
        found = {"y": work(case, contender)}
        if case.trains:
            found |= {"x": x.grad} | contender.gradients()
        torch.save({of: sample(tensor) for of, tensor in found.items()}, outputs)
        if case.dropout:
            contender = build(case, weights)
        self.run = partial(work, case, contender)
        return contender.note

    def build(self, builder, case, weights: dict[str, Tensor]):
        with self.device:
            contender = builder(case, weights)
        contender.module.train(case.trains)
        return contender

    def seconds(self) -> float:
        """Return the median over a turn of several calls: after a pause the first call is slower."""
        assert self.run is not None, "no case is prepared"
        seen = [self.clock(self.run)]
        while sum(seen) < TURN:
            seen.append(self.clock(self.run))
        return median(seen)


def main(root: str, table: str, device: str) -> None:
    sys.path.insert(0, root)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # prints must not mix with the answers
    bench = Bench(Path(root).resolve(), table, device)
    for line in sys.stdin:
        what, *details = json.loads(line)
        try:
            answer = {"answer": getattr(bench, what)(*details)}
        except Exception as error:  # noqa: BLE001 another commit may fail in any way; the row has the reason
            answer = {"error": reason(error)}
        print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    main(*sys.argv[1:])
