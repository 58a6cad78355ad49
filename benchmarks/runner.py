"""Cases x implementations -> rows: each must first be right, then they are timed in turn.

A row says of its case and implementation: the median `ms` and its interquartile range, the `speedup` over
plain torch with a 95% interval, the products' `tflops`, `of_ceiling` (the yardstick's time over its own), the
bytes saved for backward a token, the peak of memory beyond weights and input, the `error` beside float64 and
the seconds of `setup_s`, for building, compiling and first calls. One that is wrong, absent, fails or runs
out of memory has a `note`.

The yardstick, row "ceiling", is the bare matrix products of the case, gate and up joined or apart, whichever
is faster; with few tokens, if that takes longer, reading the weights at the speed of a copy.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from statistics import median

import torch
from torch import Tensor

from benchmarks.cases import BASELINE, CEILING, EIGHT_BITS, WARM, WRONG, Case
from benchmarks.implementations import Contender, Weights
from benchmarks.plain import Plain, inference, set_up, training
from benchmarks.report import reason
from benchmarks.timing import (
    Run,
    back_to_back,
    clock_of,
    comparison,
    host_seconds,
    measure,
    peak_bytes,
    relative_error,
    saved_bytes,
)
from ffn.ops import dispatch
from ffn.ops.eager import float32_in_onednn

FEW = 64  # tokens up to which reading the weights may take longer than multiplying
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
    errors = [relative_error(found[name], exact[name]) for name in exact]
    row: dict[str, object] = {"error": max(errors, key=lambda error: (error != error, error))}
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


def fast_products(x: Tensor) -> AbstractContextManager:
    """Within it bare products like x go to the library that multiplies them fastest."""
    onednn = x.is_cpu and x.dtype == torch.float32 and dispatch.float32_faster_in_onednn()
    return float32_in_onednn() if onednn else nullcontext()


def products(case: Case, x: Tensor, dy: Tensor, joined: bool) -> Run:
    """The matrix products of the case alone, on operands of their shapes, gate and up as one or apart."""
    block, dtype = case.block, torch.float32 if case.dtype == "float32" else torch.bfloat16
    new = partial(torch.randn, dtype=dtype, device=x.device)
    parts, width = (1, 2 * block.hidden_dim) if joined else (1 + block.gated, block.hidden_dim)
    ups, down = [new(width, block.dim) for _ in range(parts)], new(block.dim, block.hidden_dim)
    h, pres = new(case.tokens, block.hidden_dim), [new(case.tokens, width) for _ in range(parts)]
    x, dy = x.detach().to(dtype), dy.to(dtype)

    @torch.no_grad()
    def run() -> None:
        with fast_products(x):
            _ = [x @ up.t() for up in ups], h @ down.t()
            if case.work == "training":
                _ = (
                    dy @ down,
                    dy.t() @ h,
                    [(pre.t() @ x, pre @ up) for pre, up in zip(pres, ups, strict=True)],
                )

    return run


def copied_bytes(device: torch.device) -> int:
    """How much a copy moves, for the speed of the memory: more than a cache holds."""
    return 1 << (30 if device.type == "cuda" else 27)


def copying(device: torch.device) -> Run:
    source = torch.ones(copied_bytes(device), dtype=torch.uint8, device=device)
    return partial(torch.empty_like(source).copy_, source)


def yardsticks(case: Case, x: Tensor, dy: Tensor) -> dict[str, Run]:
    """What the row "ceiling" may come from."""
    runs = {f"{CEILING} apart": products(case, x, dy, joined=False)}
    if case.block.gated:
        runs[f"{CEILING} joined"] = products(case, x, dy, joined=True)
    if case.work == "inference" and case.tokens <= FEW:
        runs[f"{CEILING} copy"] = copying(x.device)
    return runs


def yardstick(case: Case, weights: Weights, taken: dict[str, list[float]]) -> tuple[list[float], dict] | None:
    """(seconds in each round, what is done a second), taking the yardsticks out; None if one failed."""
    found = {name: taken.pop(name) for name in list(taken) if name.startswith(CEILING)}
    copy = found.pop(f"{CEILING} copy", None)
    if not found:
        return None
    best = min(found.values(), key=median)
    if copy is not None:
        read = sum(w.nbytes for w in weights.values())
        moved = 2 * copied_bytes(weights["up_proj.weight"].device)  # read and written
        copy = [read / moved * s for s in copy]
        if median(copy) > median(best):
            return copy, {"gbs": read / median(copy) / 1e9}
    return best, {"tflops": case.flops / median(best) / 1e12}


@contextmanager
def noted(row: dict) -> Iterator[None]:
    """What goes wrong within becomes the row's note."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 another's package may fail in any way; the row says how
        row["note"] = reason(error)
    if "note" in row and torch.cuda.is_available():
        torch.cuda.empty_cache()


def guarded(run: Run, row: dict) -> Run:
    """The call, which after it has failed once does nothing."""

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
    return contender, guarded(run, row)


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
        for name, run in yardsticks(case, x, dy).items():
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
    clock = clock_of(device, cold=case.tokens <= FEW and case.work != WARM, warm=case.work == WARM)
    once = host_seconds(lambda: [clock(run) for run in runs.values()])  # what the clock adds, too
    rounds = max(ROUNDS[0], min(ROUNDS[1], int(seconds / once)))
    taken = measure(runs, rounds=rounds, warmup=2, clock=clock)
    if failed(rows[CEILING]):
        taken = {name: s for name, s in taken.items() if not name.startswith(CEILING)}
    fill_in(rows, case, weights, {name: s for name, s in taken.items() if not failed(rows.get(name, {}))})
    return list(rows.values())


def fill_in(rows: dict[str, dict], case: Case, weights: Weights, taken: dict[str, list[float]]) -> None:
    """Write into the rows what the seconds of each round say."""
    least = yardstick(case, weights, taken)
    if least is not None:
        taken[CEILING] = least[0]
        rows[CEILING] |= least[1]
    for name, seconds in taken.items():
        row, found = rows[name], comparison(taken.get(BASELINE, seconds), seconds)
        if BASELINE not in taken:
            found = {key: found[key] for key in ("ms", "iqr")}
        row |= found | {"rounds": len(seconds)}
        if name != CEILING:
            row["tflops"] = case.flops / found["ms"] / 1e9
            if least is not None and name not in EIGHT_BITS:
                row["of_ceiling"] = median(least[0]) / median(seconds)
