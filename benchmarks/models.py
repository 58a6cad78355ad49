"""One case of whole models: draw weights, check and prepare implementations, time them in turn."""

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.cases import BASELINE, CEILING, EIGHT_BITS
from benchmarks.report import reason
from benchmarks.runner import ROUNDS, failed, guarded, noted
from benchmarks.timing import (
    Run,
    comparison,
    host_seconds,
    measure,
    peak_bytes,
    quartiles,
    relative_error,
    saved_bytes,
    worst,
)
from benchmarks.twins import SHAPES, Build, Shape, Twin, Weights, build_torch, config_of, draw
from benchmarks.yardstick import fast_products
from ffn.gpt.cost import flops_per_token

WRONG = {"float32": 1e-5, "bfloat16": 3e-2, "autocast": 3e-2}  # relative errors larger than any rounding
FIRST = "first token of "  # before the name of an implementation


@dataclass(frozen=True)
class Case:
    """A training step or a generation at one shape; new_tokens per row after the prompt, 0 for training."""

    work: str
    name: str
    batch: int
    dtype: str
    dropout: float = 0.0
    new_tokens: int = 0

    @property
    def shape(self) -> Shape:
        return SHAPES[self.name]

    @property
    def training(self) -> bool:
        return self.work == "training step"

    @property
    def tokens(self) -> int:
        """Number of tokens that a call trains on or generates."""
        return self.batch * (self.shape.max_seq_len if self.training else self.new_tokens)

    @property
    def element(self) -> torch.dtype:
        return getattr(torch, "float32" if self.dtype == "autocast" else self.dtype)

    def autocast(self, device: torch.device) -> AbstractContextManager:
        return torch.autocast(device.type, torch.bfloat16) if self.dtype == "autocast" else nullcontext()

    def columns(self, implementation: str) -> dict[str, object]:
        about = {"work": self.work, "shape": self.name, "batch": self.batch, "dtype": self.dtype}
        about |= {"dropout": self.dropout, "implementation": implementation}
        return about if self.training else about | {"new_tokens": self.new_tokens}

    def __str__(self) -> str:
        dropout = f", dropout {self.dropout}" if self.dropout else ""
        return f"{self.work} of {self.name}, batch {self.batch}, {self.dtype}{dropout}"

    def draw_tokens(self, rows: int, columns: int, device: torch.device) -> Tensor:
        torch.manual_seed(1)
        return torch.randint(self.shape.vocab_size, (rows, columns)).to(device)


def prompt_of(shape: Shape) -> int:
    return min(32, shape.max_seq_len // 2)


class Exact(NamedTuple):
    """The model in float64, and its answers to a few tokens."""

    twin: Twin
    tokens: Tensor
    answers: list[Tensor]


def answers(case: Case, twin: Twin, tokens: Tensor) -> list[Tensor]:
    """Return logits without dropout and, for training, the token table's gradient and the others' norm."""
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    twin.model.eval()
    with torch.no_grad(), case.autocast(tokens.device):
        found = [twin.logits(inputs)]
    if case.training:
        with case.autocast(tokens.device):
            loss = twin.loss(inputs, targets)
        loss.backward()
        found.append(twin.table.grad.clone())
        others = [p.grad for p in twin.model.parameters() if p is not twin.table and p.grad is not None]
        norms = [torch.linalg.vector_norm(grad, dtype=torch.float64).item() for grad in others]
        found.append(torch.tensor([math.hypot(*norms)], dtype=torch.float64))
        twin.model.zero_grad(set_to_none=True)
    return found


def exactly(case: Case, weights: Weights, device: torch.device) -> Exact:
    case = replace(case, dtype="float64")
    twin = build_torch(case.shape, 0.0, weights, torch.float64)
    tokens = case.draw_tokens(2, min(64, case.shape.max_seq_len) + 1, device)
    return Exact(twin, tokens, answers(case, twin, tokens))


def error_of(case: Case, twin: Twin, exact: Exact) -> float:
    found = answers(case, twin, exact.tokens)
    return worst(relative_error(*pair) for pair in zip(found, exact.answers, strict=True))


def regret(exact: Exact, prompt: Tensor, made: Tensor) -> float:
    """Return how far the float64 logits of the generated tokens lie at most below the best ones, in the first
    and last row, relative to the root mean square of all logits."""
    rows = torch.cat([prompt, made], 1)[[0, -1]]
    with torch.no_grad():
        logits = exact.twin.logits(rows)[:, prompt.shape[1] - 1 : -1]
    chosen = logits.gather(-1, made[[0, -1], :, None])
    return ((logits.amax(-1, keepdim=True) - chosen).max() / logits.square().mean().sqrt()).item()


def prepare_training(case: Case, twin: Twin, device: torch.device) -> tuple[Run, dict]:
    """Return a step on one fixed batch and the memory columns of its row."""
    model = twin.model.train()
    tokens = case.draw_tokens(case.batch, case.shape.max_seq_len + 1, device)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    fused = device.type == "cuda"  # as in nanoGPT
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1, fused=fused
    )

    def loss() -> Tensor:
        with case.autocast(device):
            return twin.loss(inputs, targets)

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    if case.dropout and loss().item() == loss().item():
        raise ValueError("drops nothing")
    saved = saved_bytes(loss, model.parameters())
    return step, {"saved_MB": saved / 1e6, "peak_MB": peak_bytes(step, device) / 1e6}


def prepare_generation(
    case: Case, twin: Twin, device: torch.device, exact: Exact, limit: float
) -> tuple[Callable[[int], object], dict]:
    """Return a function that generates n tokens and the memory columns of its row."""
    twin.model.eval()
    prompt = case.draw_tokens(case.batch, prompt_of(case.shape), device)

    def generate(count: int) -> object:
        with case.autocast(device):
            return twin.generate(prompt, count)

    made = torch.as_tensor(generate(case.new_tokens), device=device)
    if made.shape != (case.batch, case.new_tokens):
        raise ValueError(f"wrong, so not timed: made {tuple(made.shape)} tokens")
    most = min(10 * limit, 0.3)  # each of many logits has its share of the error
    if not regret(exact, prompt, made) <= most:
        raise ValueError("wrong, so not timed: did not choose the likeliest tokens")
    return generate, {"peak_MB": peak_bytes(partial(generate, case.new_tokens), device) / 1e6}


def prepare(
    case: Case, builders: dict[str, Build], device: torch.device
) -> tuple[dict[str, dict], dict[str, Run]]:
    """Return a row per implementation, and the runs of the correct ones to time."""
    rows = {name: case.columns(name) for name in builders}
    runs: dict[str, Run] = {}
    weights = draw(case.shape, device)
    exact = exactly(case, weights, device)
    for name, build in builders.items():
        row, start = rows[name], time.perf_counter()
        limit = EIGHT_BITS.get(name, WRONG[case.dtype])
        with noted(row):
            twin = build(case.shape, case.dropout, weights, case.element)
            row |= {"parameters": twin.parameters, "note": twin.note, "error": error_of(case, twin, exact)}
            if not row["error"] <= limit:
                raise ValueError("wrong, so not timed")
            if case.training:
                runs[name], said = prepare_training(case, twin, device)
            else:
                generate, said = prepare_generation(case, twin, device, exact, limit)
                runs[name] = partial(generate, case.new_tokens)
                runs[FIRST + name] = partial(generate, 1)
            row |= said | {"setup_s": time.perf_counter() - start}
    return rows, {name: guarded(run, rows[name.removeprefix(FIRST)]) for name, run in runs.items()}


def products(case: Case, device: torch.device) -> tuple[Run, int]:
    """Return the matmuls of all Linears, forward and backward, on operands of their shapes; and the FLOPs."""
    N, D, dtype = case.tokens, case.shape.dim, torch.float32 if case.dtype == "float32" else torch.bfloat16
    sizes = [(D, 3 * D), (D, D), (D, 4 * D), (4 * D, D)] * case.shape.num_layers
    sizes += [(D, case.shape.vocab_size)]
    new = partial(torch.randn, dtype=dtype, device=device)
    operands = {(i, o): (new(N, i), new(o, i), new(N, o)) for i, o in sizes}

    def run() -> None:
        with fast_products(operands[sizes[0]][0]):
            for size in sizes:
                x, weight, dy = operands[size]
                _ = x @ weight.t(), dy @ weight, dy.t() @ x

    return run, 6 * N * sum(i * o for i, o in sizes)


def run_case(
    case: Case, builders: dict[str, Build], device: torch.device, rounds: int, seconds: float
) -> list[dict]:
    """Return a row per implementation, from at most `rounds` rounds within the seconds, but at least five."""
    start = time.perf_counter()
    try:
        rows, runs = prepare(case, builders, device)
    except Exception as error:  # noqa: BLE001 too large for this machine, most likely
        return [case.columns(name) | {"note": reason(error)} for name in builders]
    if not runs:
        return list(rows.values())
    ceiling: dict[str, object] = {}
    operations = 0
    if case.training:
        with noted(ceiling):
            bare, operations = products(case, device)
            runs[CEILING] = guarded(bare, ceiling)

    def clock(run: Run) -> float:
        if device.type != "cuda":
            return host_seconds(run)
        torch.cuda.synchronize(device)
        return host_seconds(lambda: (run(), torch.cuda.synchronize(device)))

    once = sum(map(clock, runs.values()))
    left = seconds - (time.perf_counter() - start)
    rounds = max(min(rounds, ROUNDS[0]), int(min(rounds, left / once)))
    taken = measure(runs, rounds=rounds, warmup=0, clock=clock)
    all_rows = {**rows, CEILING: ceiling}
    taken = {name: s for name, s in taken.items() if not failed(all_rows[name.removeprefix(FIRST)])}
    for name, row in rows.items():
        if name in taken:
            row |= said_of_times(case, name, taken)
            row |= utilisation(case, row, taken[CEILING], operations) if CEILING in taken else {}
            if case.training and "saved_MB" in rows.get(BASELINE, {}):
                row["saved_ratio"] = row["saved_MB"] / rows[BASELINE]["saved_MB"]
    return list(rows.values())


def said_of_times(case: Case, name: str, taken: dict[str, list[float]]) -> dict[str, float]:
    seconds = taken[name]
    row = comparison(taken.get(BASELINE), seconds)
    row |= {"rounds": len(seconds), "tokens_per_s": case.tokens / row["ms"] * 1e3}
    if FIRST + name in taken:
        row["ttft_ms"] = 1e3 * quartiles(taken[FIRST + name])[1]
    if "transformers" in taken:
        row["over_transformers"] = quartiles(taken["transformers"])[1] / quartiles(seconds)[1]
    return row


def utilisation(case: Case, row: dict, ceiling: list[float], operations: int) -> dict[str, float]:
    config = config_of(case.shape, case.dropout)
    rate = flops_per_token(config, case.shape.max_seq_len, training=True) * row["tokens_per_s"] / 1e12
    most = operations / quartiles(ceiling)[1] / 1e12
    return {"tflops": rate, "ceiling_tflops": most, "mfu": rate / most}
