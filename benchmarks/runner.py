"""Cases x implementations -> rows: check each implementation, then time them in turn.

A row has the median `ms` and its interquartile range, the `speedup` over plain torch with a 95% interval, the
matmuls' `tflops`, `of_ceiling` (the yardstick's time over its own), the bytes saved for backward per token,
the peak memory beyond weights and input, the `error` against float64, and `setup_s`, the seconds for
building, compiling and first calls. An implementation that is wrong, absent, fails or runs out of memory has
a `note`. On a CPU, inference of a few tokens is timed over so many equal `blocks` in turn that none finds its
weights in the cache.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from statistics import median

import torch
from torch import Tensor

from benchmarks.cases import BASELINE, CEILING, EIGHT_BITS, WARM, WRONG, Case
from benchmarks.implementations import Contender, Weights
from benchmarks.plain import Plain, inference, set_up, training
from benchmarks.report import reason
from benchmarks.timing import (
    Rotation,
    Run,
    back_to_back,
    clock_of,
    comparison,
    host_seconds,
    measure,
    peak_bytes,
    relative_error,
    saved_bytes,
    worst,
)
from benchmarks.yardstick import FEW, blocks_of, reads_weights, yardstick, yardsticks

ROUNDS = (5, 30)
Build = Callable[[Case, Weights], Contender]


def textbook(case: Case, weights: Weights, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """Return y and, for training, the gradients, in float64 without dropout."""
    block = case.block
    with x.device:
        plain = Plain(block.dim, block.hidden_dim, block.activation, 0.0, block.bias).double()
    plain.load_state_dict(weights)
    x = x.detach().double().requires_grad_(case.trains)
    if not case.trains:
        with torch.no_grad():
            return {"y": plain(x)}
    y = plain(x)
    y.backward(dy.double())
    return {"y": y.detach(), "x": x.grad} | {name: p.grad for name, p in plain.named_parameters()}


def captured(forward: Callable[[], Tensor], device: torch.device) -> tuple[Run, Callable[[], Tensor]]:
    """Return (a function that repeats the call, one that returns its output); CUDA graphs on a GPU."""
    if device.type != "cuda":
        return forward, forward
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(3):
            forward()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = forward()

    def output() -> Tensor:
        y.zero_()
        graph.replay()
        return y

    return graph.replay, output


def prepare(
    case: Case, contender: Contender, weights: Weights, x: Tensor, dy: Tensor, exact: dict[str, Tensor]
) -> tuple[Run, dict]:
    """Return (the function to time, the columns known before timing)."""
    module, device = contender.module, x.device
    if not case.trains:
        module.eval()
        run = output = partial(inference, case, contender, x)
        output()
        row = {"peak_MB": peak_of(contender, run, device)}
        if case.tokens <= FEW:
            run, output = captured(run, device)
        return run, row | {"error": relative_error(output(), exact["y"])}
    module.train(case.dropout == 0.0)
    found = {"y": training(case, contender, x, dy), "x": x.grad} | contender.gradients()
    errors = (relative_error(found[name], exact[name]) for name in exact)
    row: dict[str, object] = {"error": worst(errors)}
    module.train()
    run = partial(training, case, contender, x, dy)
    y = run()
    if case.dropout:
        check_dropout(case.dropout, y, exact["y"], dy, weights, contender.gradients())

    def forward() -> Tensor:
        with case.autocast(device):
            return module(x)

    with contender.setting():
        row["saved_per_token"] = saved_bytes(forward, module.parameters()) / case.tokens
    module.zero_grad(set_to_none=True)
    x.grad = None
    return run, row | {"peak_MB": peak_of(contender, run, device)}


def check_dropout(
    p: float, y: Tensor, exact: Tensor, dy: Tensor, weights: Weights, gradients: Weights
) -> None:
    """Raise ValueError unless dropout has the right strength and backward uses forward's mask.

    For any mask y is linear in the weight and bias of down: <dW, W> + <db, b> = <dy, y>. With another mask in
    backward the two sides differ by about one term of such a sum of N D independent terms.
    """
    usual = (p / (1 - p)) ** 0.5
    if not 0.3 * usual < relative_error(y, exact) < 3 * usual:
        raise ValueError("wrong, so not timed: drops too little or too much")
    of_down = [(gradients[n].double() * w.double()).sum() for n, w in weights.items() if n.startswith("down")]
    of_y, term = (dy.double() * y.double()).sum(), dy.double().norm() * y.double().norm() / y.numel() ** 0.5
    if not (sum(of_down) - of_y).abs() < 0.1 * term:
        raise ValueError("wrong, so not timed: backward drops others than forward")


def peak_of(contender: Contender, run: Run, device: torch.device) -> float | None:
    """Return the peak memory in MB; None for compiled code on the CPU, whose allocations are not counted."""
    compiled = contender.module._compiled_call_impl is not None
    return None if compiled and device.type != "cuda" else peak_bytes(run, device) / 1e6


@contextmanager
def noted(row: dict) -> Iterator[None]:
    """Context: an exception becomes the row's note."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 another package may fail in any way; the row has the reason
        row["note"] = reason(error)
    if "note" in row and torch.cuda.is_available():
        with suppress(Exception):  # after some GPU errors every call fails
            torch.cuda.empty_cache()


def guarded(run: Run, row: dict) -> Run:
    """Wrap the call: after its first failure it does nothing."""
    if isinstance(run, Rotation):
        return Rotation([guarded(each, row) for each in run.runs])

    def attempt() -> None:
        if not failed(row):
            try:
                run()
            except Exception as error:  # noqa: BLE001 the others must still be timed
                row["note"] = f"failed: {reason(error)}"

    return attempt


def failed(row: dict) -> bool:
    return row.get("note", "").startswith("failed: ")


def enter(
    case: Case, build: Build, row: dict, weights: Weights, x: Tensor, dy: Tensor, exact: dict[str, Tensor]
) -> tuple[Contender, Run | None]:
    """Return (the contender, the function to time or None if it is wrong), and fill in the row."""
    start = time.perf_counter()
    with x.device:
        contender = build(case, weights)
    run, said = prepare(case, contender, weights, x, dy, exact)
    row |= {"note": contender.note} | said | {"setup_s": time.perf_counter() - start}
    if not row["error"] <= EIGHT_BITS.get(row["implementation"], WRONG[case.dtype]):
        row["note"] = "wrong, so not timed"
        return contender, None
    if x.is_cuda:
        row["host_ms"] = 1e3 * back_to_back(run, x.device)
    if not reads_weights(case, x):
        return contender, guarded(run, row)
    others = [partial(inference, case, build(case, weights), x) for _ in range(1, blocks_of(weights))]
    for other in others:
        other()
    row["blocks"] = 1 + len(others)
    return contender, guarded(Rotation([run, *others]), row)


def run_case(
    case: Case, builders: dict[str, Build], device: torch.device, *, seconds: float = 5.0
) -> list[dict]:
    """Return a row per implementation and one for the ceiling; timing takes `seconds`, or five rounds."""
    torch.compiler.reset()  # drop the graphs of other cases: each case has its own shapes
    about = case.columns() | {"device": device.type}
    rows = {name: about | {"implementation": name} for name in (*builders, CEILING)}
    if case.work == WARM and device.type != "cpu":  # the GPU clock empties the cache
        return [row | {"note": "runs on CPUs"} for row in rows.values()]
    runs: dict[str, Run] = {}
    try:
        weights, x, dy = set_up(case, device)
        exact = textbook(case, weights, x, dy)
        for name, run in yardsticks(case, weights, x, dy).items():
            runs[name] = guarded(run, rows[CEILING])
    except Exception as error:  # noqa: BLE001 too large for this machine, most likely
        return [row | {"note": reason(error)} for row in rows.values()]
    contenders = []
    for name, build in builders.items():
        with noted(rows[name]):
            contender, run = enter(case, build, rows[name], weights, x, dy, exact)
            contenders.append(contender)  # a replayed graph does not keep its weights alive
            if run is not None:
                runs[name] = run
    del exact
    try:
        taken = timed(case, runs, device, seconds)
    except Exception as error:  # noqa: BLE001 the device itself fails; earlier notes are kept
        for name in runs:
            rows.get(name, rows[CEILING])["note"] = f"failed: {reason(error)}"
        return list(rows.values())
    if failed(rows[CEILING]):
        taken = {name: s for name, s in taken.items() if not name.startswith(CEILING)}
    fill_in(rows, case, weights, {name: s for name, s in taken.items() if not failed(rows.get(name, {}))})
    return list(rows.values())


def timed(case: Case, runs: dict[str, Run], device: torch.device, seconds: float) -> dict[str, list[float]]:
    """Return the seconds of each run in each round, for `seconds` in all or five rounds."""
    clock = clock_of(device, cold=case.tokens <= FEW and case.work != WARM, warm=case.work == WARM)
    once = host_seconds(lambda: [clock(run) for run in runs.values()])  # includes the overhead of the clock
    rounds = max(ROUNDS[0], min(ROUNDS[1], int(seconds / once)))
    return measure(runs, rounds=rounds, warmup=2, clock=clock)


def fill_in(rows: dict[str, dict], case: Case, weights: Weights, taken: dict[str, list[float]]) -> None:
    """Fill in the timing columns of the rows."""
    least = yardstick(case, weights, taken)
    if least is not None:
        taken[CEILING] = least[0]
        rows[CEILING] |= least[1]
    for name, seconds in taken.items():
        row, found = rows[name], comparison(taken.get(BASELINE), seconds)
        row |= found | {"rounds": len(seconds)}
        if name != CEILING:
            row["tflops"] = case.flops / found["ms"] / 1e9
            if least is not None and name not in EIGHT_BITS:
                row["of_ceiling"] = median(least[0]) / median(seconds)
