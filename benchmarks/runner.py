"""Cases x implementations -> rows: each must first be right, then they are timed in turn.

A row says of its case and implementation: the median `ms` and its interquartile range, the `speedup` over
plain torch with a 95% interval, the products' `tflops`, `of_ceiling` (the time of the bare products, or with
few tokens of reading the weights at the speed of a copy, over its own), the bytes saved for backward a token,
the peak of memory beyond weights and input, the `error` beside float64 and the seconds of `setup_s`, for
building, compiling and first calls. One that is wrong, absent, fails or runs out of memory has a `note`.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.implementations import Contender, Weights
from benchmarks.plain import Plain
from benchmarks.timing import (
    Run,
    back_to_back,
    clock_of,
    comparison,
    measure,
    peak_bytes,
    relative_error,
    saved_bytes,
)
from ffn.ops import dispatch
from ffn.ops.eager import float32_in_onednn

BASELINE, CEILING = "torch", "ceiling"
WRONG = {"float32": 1e-5, "bfloat16": 2e-2, "autocast": 2e-2}  # relative errors that rounding never reaches
EIGHT_BITS = {"torchao float8": 0.1, "ffn int8": 0.1}  # whose rounding is larger
FEW = 64  # tokens up to which reading the weights, not multiplying, is the limit
ROUNDS = (5, 30)
Build = Callable[[Case, Weights], Contender]


def set_up(case: Case, device: torch.device) -> tuple[Weights, Tensor, Tensor]:
    """(weights, x, dy), the same for all."""
    torch.manual_seed(0)
    block = case.block
    with device:
        plain = Plain(block.dim, block.hidden_dim, block.activation, 0.0, block.bias)
        x, dy = torch.randn(2, case.tokens, block.dim).to(case.element).unbind()
    weights = {name: w.to(case.element) for name, w in plain.state_dict().items()}
    return weights, x.clone().requires_grad_(case.work == "training"), dy.clone()


def textbook(case: Case, weights: Weights, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """y, and for training the gradients, in float64 and without dropout."""
    block = case.block
    with x.device:
        plain = Plain(block.dim, block.hidden_dim, block.activation, 0.0, block.bias).double()
    plain.load_state_dict(weights)
    x = x.detach().double().requires_grad_(case.work == "training")
    if case.work == "inference":
        with torch.no_grad():
            return {"y": plain(x)}
    y = plain(x)
    y.backward(dy.double())
    return {"y": y.detach(), "x": x.grad} | {name: p.grad for name, p in plain.named_parameters()}


def training(case: Case, contender: Contender, x: Tensor, dy: Tensor) -> Tensor:
    """The output, with the gradients left in the parameters and in x."""
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


def prepare(case: Case, contender: Contender, x: Tensor, dy: Tensor, exact: dict[str, Tensor]):
    """(what to time, what the row says of it already)."""
    module, device = contender.module, x.device
    if case.work == "inference":
        module.eval()
        run = output = partial(inference, case, contender, x)
        if case.tokens <= FEW:
            run, output = captured(run, device)
        error = relative_error(output(), exact["y"])
        return run, {"error": error, "peak_MB": peak_of(contender, run, device)}
    module.train(case.dropout == 0.0)
    found = {"y": training(case, contender, x, dy), "x": x.grad} | contender.gradients()
    errors = [relative_error(found[name], exact[name]) for name in exact]
    row: dict[str, object] = {"error": max(errors, key=lambda error: (error != error, error))}
    module.train()
    run = partial(training, case, contender, x, dy)
    if relative_error(run(), exact["y"]) < case.dropout:  # about sqrt(p / (1 - p)), were p dropped
        raise ValueError("drops nothing")

    def forward() -> Tensor:
        with case.autocast(device):
            return module(x)

    with contender.setting():
        row["saved_per_token"] = saved_bytes(forward, module) / case.tokens
    module.zero_grad(set_to_none=True)
    x.grad = None
    return run, row | {"peak_MB": peak_of(contender, run, device)}


def peak_of(contender: Contender, run: Run, device: torch.device) -> float | None:
    """In MB; on the CPU compiled code is not seen."""
    compiled = contender.module._compiled_call_impl is not None
    return None if compiled and device.type != "cuda" else peak_bytes(run, device) / 1e6


def products(case: Case, x: Tensor, dy: Tensor) -> Run:
    """The matrix products of the case alone, gate and up as one, on operands of their shapes."""
    block, dtype = case.block, torch.float32 if case.dtype == "float32" else torch.bfloat16
    width, new = block.hidden_dim * (1 + block.gated), partial(torch.randn, dtype=dtype, device=x.device)
    up, down = new(width, block.dim), new(block.dim, block.hidden_dim)
    h, pre = new(case.tokens, block.hidden_dim), new(case.tokens, width)
    x, dy = x.detach().to(dtype), dy.to(dtype)
    onednn = x.device.type == "cpu" and dtype == torch.float32 and dispatch.float32_faster_in_onednn()

    @torch.no_grad()
    def run() -> None:
        with float32_in_onednn() if onednn else nullcontext():
            _ = x @ up.t(), h @ down.t()
            if case.work == "training":
                _ = dy @ down, dy.t() @ h, pre.t() @ x, pre @ up

    return run


def ceiling(case: Case, weights: Weights, x: Tensor, dy: Tensor) -> tuple[Run, float, dict]:
    """(what to time, what its seconds times this factor are the case's least, what is done in that time)."""
    if case.tokens > FEW or case.work == "training":
        return products(case, x, dy), 1.0, {"tflops": case.flops / 1e12}
    source = torch.ones((1 << 30) if x.is_cuda else (1 << 27), dtype=torch.uint8, device=x.device)
    target = torch.empty_like(source)
    read = sum(w.nbytes for w in weights.values())
    return partial(target.copy_, source), read / (2 * source.nbytes), {"gbs": read / 1e9}


def reason(error: BaseException) -> str:
    """One line for a row."""
    text = f"{type(error).__name__}: {error}".strip().splitlines()[0][:120]
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error):
        return "out of memory"
    return str(error) if type(error) is ValueError else text


@contextmanager
def noted(row: dict) -> Iterator[None]:
    """What goes wrong within becomes the row's note."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 another's package may fail in any way; the row says how
        row["note"] = reason(error)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def guarded(run: Run, row: dict) -> Run:
    """The call, which after it has failed once does nothing."""

    def attempt() -> None:
        if not row.get("note", "").startswith("failed: "):
            try:
                run()
            except Exception as error:  # noqa: BLE001 the others are still to be timed
                row["note"] = f"failed: {reason(error)}"

    return attempt


def run_case(
    case: Case, builders: dict[str, Build], device: torch.device, *, seconds: float = 5.0
) -> list[dict]:
    """One row an implementation, and one of the ceiling; timing takes so many seconds, or five rounds."""
    torch.compiler.reset()  # no graph of another case: each has its own shapes
    rows = {name: case.columns() | {"implementation": name} for name in (*builders, CEILING)}
    runs: dict[str, Run] = {}
    factor, rate = 1.0, {}
    try:
        weights, x, dy = set_up(case, device)
        exact = textbook(case, weights, x, dy)
        runs[CEILING], factor, rate = ceiling(case, weights, x, dy)
    except Exception as error:  # noqa: BLE001 too large for this machine, most likely
        return [row | {"note": reason(error)} for row in rows.values()]
    limit = WRONG[case.dtype]
    for name, build in builders.items():
        row, start = rows[name], time.perf_counter()
        with noted(row):
            with device:
                contender = build(case, weights)
            run, said = prepare(case, contender, x, dy, exact)
            row |= {"note": contender.note} | said | {"setup_s": time.perf_counter() - start}
            if row["error"] <= EIGHT_BITS.get(name, limit):
                if device.type == "cuda":
                    row["host_ms"] = 1e3 * back_to_back(run, device)
                runs[name] = guarded(run, row)
            else:
                row["note"] = "wrong, so not timed"
    del exact
    clock = clock_of(device)
    once = sum(clock(run) for run in runs.values())
    rounds = max(ROUNDS[0], min(ROUNDS[1], int(seconds / once)))
    taken = measure(runs, rounds=rounds, warmup=2, clock=clock)
    fill_in(rows, taken, case, factor, rate)
    return list(rows.values())


def fill_in(
    rows: dict[str, dict], taken: dict[str, list[float]], case: Case, factor: float, rate: dict
) -> None:
    """Write into the rows what the seconds of each round say."""
    least = [factor * s for s in taken[CEILING]]
    baseline = taken.get(BASELINE)
    for name, seconds in ({**taken, CEILING: least}).items():
        row = rows[name]
        if row.get("note", "").startswith("failed: "):
            continue
        found = comparison(baseline or seconds, seconds)
        if baseline is None:
            found = {key: found[key] for key in ("ms", "iqr")}
        row |= found | {"rounds": len(seconds)}
        if name == CEILING:
            row |= {key: value / found["ms"] * 1e3 for key, value in rate.items()}
        else:
            of_ceiling = comparison(least, seconds)["speedup"]
            row |= {"of_ceiling": of_ceiling, "tflops": case.flops / found["ms"] / 1e9}
