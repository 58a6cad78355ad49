"""FeedForward on a GPU in bfloat16, beside plain torch, torch.compile, Liger and quack.

python -m benchmarks gpu                           every case, each in a process of its own, within --budget
python -m benchmarks gpu --cases qwen-8192         one case, here
python -m benchmarks gpu --device cpu              a dry run at toy sizes, which shows only that all runs

Each contender is compared with the textbook in float32 first: its output and, with dropout off, its
gradients; a wrong one is not timed. `speedup` is over plain torch. `ceiling` runs in turn with the others:
when training the bare matrix products of the same shapes; when decoding, which replays CUDA graphs, a copy
that moves as many bytes as the weights have. `of_ceiling` is its time over the contender's. `ms` is the
GPU's time, `host_ms` that of calls back to back by the host's clock. `setup_s` is building, compilation and
first calls. max-autotune goes without CUDA graphs. `peak_MB` is what a forward and backward hold beyond
weights and input.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from benchmarks.block import Plain
from benchmarks.contenders import IMPLEMENTATIONS, Case, Contender, Weights
from benchmarks.report import arguments, keep, publish, table
from benchmarks.timing import (
    Run,
    back_to_back,
    clock_of,
    comparison,
    measure,
    peak_bytes,
    relative_error,
    saved_bytes,
    speedup,
)

COLUMNS = ["case", "implementation", "ms", "iqr", "speedup", "low", "high", "of_ceiling", "tflops", "host_ms"]
COLUMNS += ["saved_MB", "peak_MB", "error", "setup_s", "note"]
SUMMARY = ["case", "implementation", "ms", "speedup", "of_ceiling", "host_ms", "saved_MB", "peak_MB", "note"]
WRONG = 1e-2  # bfloat16 comes within a few thousandths of float32

BLOCKS = {
    "gpt2": Case("", 768, 3072, "gelu", 0, bias=True),
    "gpt2-dropout": Case("", 768, 3072, "gelu", 0, bias=True, dropout=0.1),
    "qwen": Case("", 896, 4864, "swiglu", 0),
    "2048": Case("", 2048, 5632, "swiglu", 0),
    "llama": Case("", 4096, 14336, "swiglu", 0),
}
TOKENS = (8192, 16384)
CASES = {f"{block}-{n}": replace(BLOCKS[block], tokens=n) for n in TOKENS for block in BLOCKS}
CASES |= {f"decode-{n}": replace(BLOCKS["llama"], tokens=n, work="decoding") for n in (1, 4, 16)}
CASES = {name: replace(case, name=name) for name, case in CASES.items()}

# Those that try out many kernels first, or could take the process down with them, run apart.
APART = ("quack", "torch max-autotune", "quack tuned")
TOGETHER = tuple(name for name in IMPLEMENTATIONS if name not in APART)
DECODING = tuple(name for name in TOGETHER if name not in ("ffn unfused", "ffn fused", "ffn save=input"))
GATED = ("qwen", "llama", "2048")
DECODE = tuple(f"decode-{n}" for n in (1, 4, 16))


@dataclass(frozen=True)
class Job:
    """Cases for one process, which may take so many seconds, if the package is there."""

    cases: tuple[str, ...]
    names: tuple[str, ...] = TOGETHER
    limit: float = 150
    package: str = "torch"


def at_each_count(block: str) -> tuple[str, ...]:
    return tuple(f"{block}-{n}" for n in TOKENS)


def beside(name: str, *cases: tuple[str, ...]) -> Job:
    return Job(tuple(chain(*cases)), ("torch", "ffn", name), limit=100, package=name.split()[0])


# What tells the most comes first: what the budget does not reach is skipped.
JOBS = [Job(at_each_count(block)) for block in ("gpt2", "llama", "qwen", "gpt2-dropout", "2048")]
JOBS += [Job(DECODE, DECODING), beside("quack", *map(at_each_count, GATED), DECODE)]
JOBS += [beside("torch max-autotune", at_each_count(block)) for block in BLOCKS]
JOBS += [beside("quack tuned", *map(at_each_count, GATED))]


def textbook(case: Case, weights: Weights, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """y, and for training the gradients, in float32 and without dropout."""
    with x.device:
        plain = Plain(case.dim, case.hidden_dim, case.activation, 0.0, case.bias)
    plain.load_state_dict(weights)
    x = x.detach().float().requires_grad_(case.work == "training")
    y = plain(x)
    if case.work == "decoding":
        return {"y": y.detach()}
    y.backward(dy.float())
    return {"y": y.detach(), "x": x.grad} | {name: p.grad for name, p in plain.named_parameters()}


def training(contender: Contender, x: Tensor, dy: Tensor) -> Tensor:
    """The output, with the gradients left in the parameters and in x."""
    contender.module.zero_grad(set_to_none=True)
    x.grad = None
    with contender.setting():
        y = contender.module(x)
        y.backward(dy)
    return y.detach()


def decoding(contender: Contender, x: Tensor) -> Tensor:
    with torch.no_grad(), contender.setting():
        return contender.module(x)


def captured(forward: Callable[[], Tensor], device: torch.device) -> tuple[Run, Callable[[], Tensor]]:
    """(what repeats the call, what gives its output): through a CUDA graph where there is a GPU."""
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
    if case.work == "decoding":
        run, output = captured(partial(decoding, contender, x), device)
        return run, {"error": relative_error(output(), exact["y"])}
    module.train(case.dropout == 0.0)
    found = {"y": training(contender, x, dy), "x": x.grad} | contender.gradients()
    row = {f"error_{name}": relative_error(found[name], exact[name]) for name in exact}
    row["error"] = max(row.values(), key=lambda error: (error != error, error))
    module.train()
    run = partial(training, contender, x, dy)
    run()
    with contender.setting():
        row["saved_MB"] = saved_bytes(lambda: module(x), module) / 1e6
    module.zero_grad(set_to_none=True)
    x.grad = None
    peak = peak_bytes(run, device)
    return run, row | {"peak_MB": None if peak is None else peak / 1e6}


def products(case: Case, x: Tensor, dy: Tensor) -> Run:
    """The matrix products of a forward and backward, gate and up as one, on operands of their shapes."""
    width = case.hidden_dim * (1 + case.gated)
    up, down = x.new_empty(width, case.dim).normal_(), x.new_empty(case.dim, case.hidden_dim).normal_()
    h, pre = x.new_empty(case.tokens, case.hidden_dim).normal_(), x.new_empty(case.tokens, width).normal_()

    @torch.no_grad()
    def run() -> None:
        _ = x @ up.t(), h @ down.t(), dy @ down, dy.t() @ h
        _ = pre.t() @ x, pre @ up

    return run


def ceiling(case: Case, weights: Weights, x: Tensor, dy: Tensor) -> tuple[Run, float]:
    """(what to time, what its seconds times this factor are the least that the case can take)."""
    if case.work == "training":
        return products(case, x, dy), 1.0
    source = torch.ones((1 << 30) if x.is_cuda else (1 << 20), dtype=torch.uint8, device=x.device)
    target = torch.empty_like(source)
    moved = 2 * source.nbytes  # read and written
    return partial(target.copy_, source), sum(w.nbytes for w in weights.values()) / moved


def set_up(case: Case, device: torch.device) -> tuple[Weights, Tensor, Tensor]:
    torch.manual_seed(0)
    with device:
        plain = Plain(case.dim, case.hidden_dim, case.activation, case.dropout, case.bias)
        x, dy = torch.randn(2, case.tokens, case.dim, dtype=torch.bfloat16).unbind()
    weights = {name: w.to(torch.bfloat16) for name, w in plain.state_dict().items()}
    return weights, x.clone().requires_grad_(case.work == "training"), dy.clone()


def run_case(case: Case, names: list[str], device: torch.device, rounds: int) -> list[dict]:
    """One row an implementation, and one of the ceiling."""
    torch.compiler.reset()  # no graph of another case: each has its own shapes
    weights, x, dy = set_up(case, device)
    exact = textbook(case, weights, x, dy)
    floor, factor = ceiling(case, weights, x, dy)
    about = {"case": case.name, "tokens": case.tokens, "dropout": case.dropout, "work": case.work}
    rows, runs = {}, {"ceiling": floor}
    for name in names:
        row = rows[name] = about | {"implementation": name}
        start = time.perf_counter()
        try:
            with device:
                contender = IMPLEMENTATIONS[name](case, weights)
            run, said = prepare(case, contender, x, dy, exact)
            row |= {"note": contender.note} | said | {"setup_s": time.perf_counter() - start}
            if row["error"] <= WRONG:
                row["host_ms"] = 1e3 * back_to_back(run, device)
                runs[name] = run
            else:
                row["note"] = "wrong, so not timed"
        except Exception as error:  # noqa: BLE001 another's package may fail in any way; the row says how
            row["note"] = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:120]
    seconds = measure(runs, rounds=rounds, warmup=3, clock=clock_of(device))
    least = [factor * s for s in seconds["ceiling"]]
    rows["ceiling"] = about | {"implementation": "ceiling"}
    flops = (6 if case.work == "training" else 2) * case.tokens * sum(w.numel() for w in weights.values())
    for name, taken in ({**seconds, "ceiling": least}).items():
        found = comparison(seconds.get("torch", taken), taken)
        rows[name] |= found | {"of_ceiling": speedup(least, taken)[0], "tflops": flops / found["ms"] / 1e9}
    return list(rows.values())


def in_a_process(job: Job, seconds: float, options) -> list[dict]:
    """The rows of a job; those that it did not come to say why."""
    with TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "benchmarks", "gpu", "--results", scratch]
        command += ["--cases", *job.cases, "--implementations", *job.names]
        command += ["--device", options.device, "--backend", options.backend, "--rounds", str(options.rounds)]
        try:
            code = subprocess.run(command, cwd=Path(__file__).parents[1], timeout=seconds).returncode
            why = f"its process ended with code {code}"
        except subprocess.TimeoutExpired:
            why = f"skipped: not done in the {seconds:.0f} s it was given"
        file = Path(scratch) / "gpu.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return rows + missing(job, rows, why)


def missing(job: Job, rows: list[dict], why: str) -> list[dict]:
    done = {(row["case"], row["implementation"]) for row in rows}
    wanted = [(case, name) for case in job.cases for name in job.names]
    return [{"case": c, "implementation": n, "note": why} for c, n in wanted if (c, n) not in done]


def run_jobs(options) -> None:
    begun, rows = time.monotonic(), []
    for job in JOBS:
        left = options.budget - (time.monotonic() - begun)
        if find_spec(job.package) is None:
            found = missing(job, [], f"skipped: {job.package} is not installed")
        elif left > 20:  # less would not start a process and compile
            found = in_a_process(job, min(left, job.limit), options)
        else:
            found = missing(job, [], f"skipped: the budget of {options.budget:.0f} s is spent")
        keep("gpu", found, options.results)
        rows += found
    print(f"\nAll cases, in {time.monotonic() - begun:.0f} s:\n\n{table(rows, SUMMARY)}", flush=True)


def main(argv: list[str]) -> None:
    parser = arguments("gpu", __doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--cases", nargs="+", choices=CASES)
    parser.add_argument("--implementations", nargs="+", choices=IMPLEMENTATIONS, default=list(TOGETHER))
    parser.add_argument("--backend", choices=("auto", "eager", "triton"), default="auto", help="ffn's")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--budget", type=float, default=500, help="seconds for all cases")
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("python -m benchmarks gpu: torch sees no GPU; --device cpu makes a dry run")
    if options.cases is None:
        run_jobs(options)
        return
    for name in options.cases:
        case = replace(CASES[name], backend=options.backend)
        if device.type == "cpu":
            case = replace(case, dim=64, hidden_dim=128, tokens=min(case.tokens, 32))
        rows = run_case(case, options.implementations, device, options.rounds)
        publish("gpu", rows, COLUMNS, options.results)
