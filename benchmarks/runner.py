"""Cases x implementations -> rows: each must first be right, then they are timed in turn.

A row says of its case and implementation: the median `ms` and its interquartile range, the `speedup` over
plain torch with a 95% interval, the products' `tflops`, `of_ceiling` (the yardstick's time over its own), the
bytes saved for backward a token, the peak of memory beyond weights and input, the `error` beside float64 and
the seconds of `setup_s`, for building, compiling and first calls. One that is wrong, absent, fails or runs
out of memory has a `note`. A few tokens without gradients are timed on a CPU over so many equal `blocks` in
turn that none finds its weights in the cache.
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
    """y, and for training the gradients, in float64 and without dropout."""
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
    """(what repeats the call, what gives its output): on a GPU through a CUDA graph."""
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
    """(what to time, what the row says of it already)."""
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
    """Raise ValueError unless dropout is of the right size, and backward's mask that of forward.

    y is linear in the weight and bias of down, whatever was dropped: <dW, W> + <db, b> = <dy, y>. By another
    mask the sides differ by about the size of one term of such a sum of N D independent ones.
    """
    usual = (p / (1 - p)) ** 0.5
    if not 0.3 * usual < relative_error(y, exact) < 3 * usual:
        raise ValueError("wrong, so not timed: drops too little or too much")
    of_down = [(gradients[n].double() * w.double()).sum() for n, w in weights.items() if n.startswith("down")]
    of_y, term = (dy.double() * y.double()).sum(), dy.double().norm() * y.double().norm() / y.numel() ** 0.5
    if not (sum(of_down) - of_y).abs() < 0.1 * term:
        raise ValueError("wrong, so not timed: backward drops others than forward")


def peak_of(contender: Contender, run: Run, device: torch.device) -> float | None:
    """In MB; on the CPU compiled code is not seen."""
    compiled = contender.module._compiled_call_impl is not None
    return None if compiled and device.type != "cuda" else peak_bytes(run, device) / 1e6


@contextmanager
def noted(row: dict) -> Iterator[None]:
    """What goes wrong within becomes the row's note."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 another's package may fail in any way; the row says how
        row["note"] = reason(error)
    if "note" in row and torch.cuda.is_available():
        with suppress(Exception):  # some errors of a GPU fail whatever follows them
            torch.cuda.empty_cache()


def guarded(run: Run, row: dict) -> Run:
    """The call, which after it has failed once does nothing."""
    if isinstance(run, Rotation):
        return Rotation([guarded(each, row) for each in run.runs])

    def attempt() -> None:
        if not failed(row):
            try:
                run()
            except Exception as error:  # noqa: BLE001 the others are still to be timed
                row["note"] = f"failed: {reason(error)}"

    return attempt


def failed(row: dict) -> bool:
    return row.get("note", "").startswith("failed: ")


def enter(
    case: Case, build: Build, row: dict, weights: Weights, x: Tensor, dy: Tensor, exact: dict[str, Tensor]
) -> tuple[Contender, Run | None]:
    """(the contender, what to time of it), None if it is wrong; the row says the rest."""
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
    """One row an implementation, and one of the ceiling; timing takes so many seconds, or five rounds."""
    torch.compiler.reset()  # no graph of another case: each has its own shapes
    about = case.columns() | {"device": device.type}
    rows = {name: about | {"implementation": name} for name in (*builders, CEILING)}
    if case.work == WARM and device.type != "cpu":  # the clock of GPUs empties their cache
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
            contenders.append(contender)  # a graph that replays keeps no weight alive
            if run is not None:
                runs[name] = run
    del exact
    try:
        taken = timed(case, runs, device, seconds)
    except Exception as error:  # noqa: BLE001 the device itself fails; what went wrong before is still told
        for name in runs:
            rows.get(name, rows[CEILING])["note"] = f"failed: {reason(error)}"
        return list(rows.values())
    if failed(rows[CEILING]):
        taken = {name: s for name, s in taken.items() if not name.startswith(CEILING)}
    fill_in(rows, case, weights, {name: s for name, s in taken.items() if not failed(rows.get(name, {}))})
    return list(rows.values())


def timed(case: Case, runs: dict[str, Run], device: torch.device, seconds: float) -> dict[str, list[float]]:
    """The seconds of each run in each round, in so many seconds or five rounds."""
    clock = clock_of(device, cold=case.tokens <= FEW and case.work != WARM, warm=case.work == WARM)
    once = host_seconds(lambda: [clock(run) for run in runs.values()])  # what the clock adds, too
    rounds = max(ROUNDS[0], min(ROUNDS[1], int(seconds / once)))
    return measure(runs, rounds=rounds, warmup=2, clock=clock)


def fill_in(rows: dict[str, dict], case: Case, weights: Weights, taken: dict[str, list[float]]) -> None:
    """Write into the rows what the seconds of each round say."""
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
