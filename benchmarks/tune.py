"""Measure which matmuls this GPU should fuse with the activation, and the tiles; write the table.

python -m benchmarks tune                          as many cases as --budget allows, the most important first
python -m benchmarks tune --blocks 768/3072 --tokens 8192 --table my.json

A case is a direction, the sizes of a block and a number of tokens. Every candidate is first compared with
float32; wrong candidates and those that the device cannot run are left out. The fastest is kept if it gains
at least 1% and more than noise; otherwise the case is not fused. The forward case is the first matmul with
its activation; the backward case computes, from dy, the gradients of the preactivations, of down and of up's
bias. Cases of other devices stay in the table.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import report
from benchmarks.implementations import never, pinned
from benchmarks.tiles import CANDIDATES, CAPABILITIES
from benchmarks.timing import clock_of, measure, quartiles, relative_error, speedup
from ffn import activations
from ffn.files import atomic
from ffn.nn import gated_hidden_dim
from ffn.ops import dispatch, rule
from ffn.ops.between import Between, Needs
from ffn.ops.dense import Dense
from ffn.ops.kernels import tilings
from ffn.ops.kernels.tilings import Tiling

COLUMNS = ["case", "tiling", "ms", "unfused_ms", "speedup", "low", "high", "error", "left_out"]
WRONG = 1e-2  # bfloat16 comes within a few thousandths of float32
LEAST_GAIN = 1.01


@dataclass(frozen=True)
class Case:
    forward: bool
    D: int
    H: int
    gated: bool
    N: int

    def key(self, capability: tuple[int, int]) -> str:
        return tilings.key(self.forward, capability, "bfloat16", self.gated, self.D, self.H, self.N)


BLOCKS = {  # (D, H, gated)
    "768/3072": (768, 3072, False),
    "4096/14336 gated": (4096, 14336, True),
    "896/4864 gated": (896, 4864, True),
    "2048/5632 gated": (2048, 5632, True),
}
for _d in (768, 1024, 2048, 4096):
    BLOCKS[f"{_d}/{4 * _d}"] = (_d, 4 * _d, False)
    BLOCKS[f"{_d}/{gated_hidden_dim(_d)} gated"] = (_d, gated_hidden_dim(_d), True)
TOKENS = (8192, 16384, 4096, 2048, 1024)


def operands(case: Case, device: torch.device) -> dict[str, Tensor | None]:
    """Return x, dy (N, D), up, gate (H, D), down (D, H), bias (H) if plain, pre and pre_gate (N, H)."""
    torch.manual_seed(0)
    draw = partial(torch.randn, dtype=torch.bfloat16, device=device)
    N, D, H = case.N, case.D, case.H
    t = {"x": draw(N, D), "dy": draw(N, D), "up": draw(H, D) / D**0.5, "down": draw(D, H) / H**0.5}
    t |= {"gate": draw(H, D) / D**0.5 if case.gated else None, "bias": None if case.gated else draw(H)}
    t["pre"] = F.linear(t["x"], t["up"], t["bias"])
    return t | {"pre_gate": F.linear(t["x"], t["gate"]) if case.gated else None}


def runner(case: Case, t: dict[str, Tensor | None]) -> Callable[[], tuple]:
    """The backend's own function on the operands: what it fuses is what the table says at the time."""
    backend = dispatch.module("triton")
    between = Between(activations.TABLE["swiglu" if case.gated else "gelu"])
    if case.forward:
        up, gate = Dense(t["up"], t["bias"]), None if t["gate"] is None else Dense(t["gate"])
        return partial(rule.forward_to_hidden, backend, t["x"], up, gate, between, True)
    down, needs = Dense(t["down"]), Needs(True, t["bias"] is not None, False)
    saved = t["pre"], t["pre_gate"], between

    def back() -> tuple:
        dpre, dpre_gate, (ddown, _), *sums = rule.back_to_preactivations(
            backend, t["dy"], down, (True, False), saved, needs, False
        )
        return dpre, dpre_gate, ddown, *sums

    return back


def textbook(case: Case, t: dict[str, Tensor | None]) -> tuple[Tensor | None, ...]:
    """Compute the outputs of `runner` in float32."""
    t = {name: None if v is None else v.float() for name, v in t.items()}
    row = activations.TABLE["swiglu" if case.gated else "gelu"]
    if case.forward:
        pre, pre_gate = F.linear(t["x"], t["up"], t["bias"]), None
        if case.gated:
            pre_gate = F.linear(t["x"], t["gate"])
        return (row(pre) if pre_gate is None else row(pre_gate) * pre), pre, pre_gate
    inputs = [t[name].requires_grad_() for name in ("pre", "pre_gate") if t[name] is not None]
    h = row(inputs[-1]) * inputs[0] if case.gated else row(inputs[0])
    grads = torch.autograd.grad(h, inputs, t["dy"] @ t["down"])
    dpre, dgate = (*grads, None)[:2]
    return dpre, dgate, t["dy"].t() @ h.detach(), None if case.gated else dpre.sum(0), None


def error_of(found: tuple, exact: tuple) -> float:
    """Return the largest relative error of the outputs; infinite if one is missing or NaN."""
    errors = [
        float("inf") if a is None else relative_error(a, b)
        for a, b in zip(found, exact, strict=True)
        if b is not None
    ]
    return max(float("inf") if error != error else error for error in errors)


def candidates(case: Case, capability: tuple[int, int]) -> dict[str, Tiling | None]:
    found = CANDIDATES[case.forward, case.gated] if capability[0] in CAPABILITIES else []
    return {"unfused": None} | {"x".join(map(str, t)): t for t in found}


def pin_and_run(tiling: Tiling | None, run: Callable[[], tuple]) -> tuple:
    with pinned(never if tiling is None else lambda *key: tiling):
        return run()


def best_of(gains: dict[str, tuple[float, float, float]]) -> str:
    """Return the fastest by (gain, low, high), unless its gain may be chance: the best of many often is."""
    best = max(gains, key=lambda name: gains[name][0])
    gain, low, _ = gains[best]
    return best if gain >= LEAST_GAIN and low > 1 else "unfused"


def tune_case(case: Case, device: torch.device, capability: tuple[int, int], rounds: int):
    """Return (the tiling to keep or None, the row's columns)."""
    from triton.errors import TritonError

    t = operands(case, device)
    run, exact = runner(case, t), textbook(case, t)
    tried, left_out = candidates(case, capability), {}
    runs, errors = {}, {}
    for name, tiling in tried.items():
        candidate = partial(pin_and_run, tiling, run)
        try:
            errors[name] = error_of(candidate(), exact)
        except (TritonError, RuntimeError, ValueError) as error:  # too large, or rejected by the compiler
            left_out[name] = f"{type(error).__name__}: {error}".splitlines()[0][:80]
            continue
        if errors[name] <= WRONG:
            runs[name] = candidate
        else:
            left_out[name] = f"error {errors[name]:.2g}"
    del exact
    seconds = measure(runs, rounds=rounds, clock=clock_of(device))
    base = seconds.get("unfused")
    if base is None:
        raise RuntimeError(f"{case}: the unfused path fails, so nothing can be tuned: {left_out}")
    gains = {name: speedup(base, taken) for name, taken in seconds.items()}
    best = best_of(gains)
    ms = {name: 1e3 * quartiles(taken)[1] for name, taken in seconds.items()}
    row = {"case": case.key(capability), "tiling": best, "ms": ms[best], "unfused_ms": ms["unfused"]}
    row |= dict(zip(("speedup", "low", "high"), gains[best], strict=True))
    row |= {"error": max(errors[name] for name in runs), "all_ms": ms}
    return tried[best], row | {"left_out": "; ".join(f"{k}: {v}" for k, v in left_out.items())}


def read(path: Path) -> dict[str, Tiling | None]:
    """Return the current table; empty if it is absent or unreadable."""
    try:
        rows = json.loads(path.read_text())
        return {name: None if row is None else Tiling(**row) for name, row in rows.items()}
    except (FileNotFoundError, ValueError, TypeError, AttributeError):
        return {}


def main(argv: list[str]) -> None:
    parser = report.arguments("tune", __doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu runs the interpreter")
    parser.add_argument("--blocks", nargs="+", choices=BLOCKS, default=list(BLOCKS))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--budget", type=float, default=500, help="seconds")
    parser.add_argument("--table", type=Path, default=tilings.TABLE)
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    if device.type == "cpu" and options.table.resolve() == tilings.TABLE.resolve():
        raise SystemExit("python -m benchmarks tune: --device cpu needs a --table of its own")
    try:
        dispatch.choose("triton", device, torch.bfloat16)
    except ValueError as error:
        raise SystemExit(f"python -m benchmarks tune: {error}") from None
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)
    begun, rows, table = time.monotonic(), [], read(options.table)
    cases = [
        Case(forward, *BLOCKS[block], tokens)
        for tokens in options.tokens
        for block in options.blocks
        for forward in (False, True)
    ]
    for done, case in enumerate(cases):
        if time.monotonic() - begun > options.budget:
            print(f"{len(cases) - done} cases skipped: the budget of {options.budget:.0f} s is spent\n")
            break
        key = case.key(capability)
        table[key], row = tune_case(case, device, capability, options.rounds)
        rows.append(row)
        report.keep("tune", [row], options.out)
        atomic.write_file(options.table, tilings.to_json(table))
    print(report.table(rows, COLUMNS))
