"""Whole models, the same weights in plain torch, transformers and ffn: a step of training, and generation.

python -m benchmarks decoder                               all cases that suit the device
python -m benchmarks decoder --only "training step,tiny"   some works, shapes or implementations; torch always
python -m benchmarks decoder --only generation --dtype float32 --budget 300

Each is first compared with plain torch in float64: `error` is that of the logits and, for training, of the
gradient of the token table or the norm of all other gradients, if larger; what is generated must be what the
float64 model finds likeliest, as far as rounding allows. A wrong one is not timed. `speedup` is over plain
torch. Times are a person's: by the host's clock, until the device is done.

A step of training is forward, loss, backward and AdamW, with dropout where nanoGPT has it. `mfu`: the model's
operations a second (`ffn.gpt.cost`: matrix products and causal attention, thrice those of a forward) over
`ceiling_tflops`, the rate of the bare products of its Linears, forward and backward, run in turn with the
models. Generation is greedy, 32 tokens in; `ttft_ms` is the time to the first token out. `ffn` is not packed;
`ffn packed` and `ffn int8` are packed before all calls. `peak_MB` is what a call holds beyond weights and
optimizer.
"""

import math
import time
from collections.abc import Callable, Iterable
from functools import partial

import torch

from benchmarks import page
from benchmarks.cases import BASELINE
from benchmarks.models import WRONG, Case, prompt_of, run_case
from benchmarks.report import CASE, Progress, arguments, check_count, check_device, listed, table
from benchmarks.report import keep as kept
from benchmarks.runner import ROUNDS
from benchmarks.twins import GENERATION, SHAPES, TRAINING, Build

COLUMNS = [*CASE, "ms", "iqr", "rounds", "tokens_per_s", "ttft_ms", "speedup", "low", "high"]
COLUMNS += ["over_transformers", "mfu", "saved_MB", "saved_ratio", "peak_MB", "error", "note"]
IMPLEMENTATIONS = {"training step": TRAINING, "generation": GENERATION}
DTYPES = {"training step": ("float32", "autocast"), "generation": ("float32", "bfloat16")}


def plan(
    device: torch.device, dtypes: Iterable[str], only: Iterable[str], new_tokens: int
) -> list[tuple[Case, dict[str, Build]]]:
    """Cases and who takes part. Shapes that are named take part in every work that is.

    Raises:
        ValueError: no case is left.
    """
    only, dtypes = set(only), set(dtypes)
    trained = [name for name in SHAPES if name != "gpt2" or device.type == "cuda"]
    shapes = {"training step": trained, "generation": ["gpt2"]}
    found: list[tuple[Case, dict[str, Build]]] = []
    for work, builders in IMPLEMENTATIONS.items():
        if only & {*IMPLEMENTATIONS} and work not in only:
            continue
        if only & {*GENERATION}:
            if not only & {*builders}:
                continue
            builders = {name: build for name, build in builders.items() if name in only | {BASELINE}}
        for name in [name for name in SHAPES if name in only] or shapes[work]:
            shape, case = SHAPES[name], partial(Case, work, name)
            for dtype in [dtype for dtype in WRONG if dtype in (dtypes or DTYPES[work])]:
                if work == "generation":
                    count = min(new_tokens, shape.max_seq_len - prompt_of(shape))
                    found += [(case(batch, dtype, new_tokens=count), builders) for batch in (1, 8)]
                else:
                    found += [(case(shape.batch, dtype, dropout), builders) for dropout in (0.0, 0.1)]
    if not found:
        raise ValueError(f"--only {','.join(sorted(only))}: none of these implementations does this work")
    return found


def run(
    cases: list[tuple[Case, dict[str, Build]]],
    device: torch.device,
    *,
    rounds: int = 20,
    left: Callable[[], float] = lambda: math.inf,
    keep: Callable[[list[dict]], object] = lambda rows: None,
) -> list[dict]:
    """The rows of all cases, each case's given to `keep` as soon as it is done.

    Args:
        cases: see `plan`.
        rounds: of training; of generation, whose calls are long, a quarter but five.
        left: the seconds that there still are; a case gets its share of them.
    """
    rows: list[dict] = []
    with Progress(sum(effort(case) for case, _ in cases), quiet=False) as advance:
        for i, (case, builders) in enumerate(cases):
            advance(0, str(case))
            share = left() / (len(cases) - i)
            if share > 0:
                several = rounds if case.training else min(rounds, max(ROUNDS[0], rounds // 4))
                found = run_case(case, builders, device, several, share)
            else:
                found = [case.columns(name) | {"note": "skipped: the budget is spent"} for name in builders]
            found = [row | {"device": device.type} for row in found]
            keep(found)
            rows += found
            advance(effort(case), "")
    return rows


def effort(case: Case) -> float:
    return 1.0 if case.training else 4.0


def main(argv: list[str]) -> None:
    parser = arguments("decoder", __doc__)
    here = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=check_device, choices=("cuda", "cpu"), default=here)
    parser.add_argument("--dtype", type=listed(*WRONG), default=[], help=f"any of {','.join(WRONG)}")
    known = listed(*IMPLEMENTATIONS, *SHAPES, *GENERATION)
    parser.add_argument("--only", type=known, default=[], help="works, shapes, implementations")
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds for all cases, roughly")
    parser.add_argument("--rounds", type=check_count, default=20)
    parser.add_argument("--new-tokens", type=check_count, default=128)
    options = parser.parse_args(argv)
    where = torch.device(options.device)
    try:
        cases = plan(where, options.dtype, options.only, options.new_tokens)
    except ValueError as error:
        raise SystemExit(f"python -m benchmarks decoder: {error}") from None
    end = time.monotonic() + options.budget

    rows: list[dict] = []

    def keep(found: list[dict]) -> None:
        kept("decoder", found, options.out)
        rows.extend(found)

    try:
        run(cases, where, rounds=options.rounds, left=lambda: end - time.monotonic(), keep=keep)
    except KeyboardInterrupt:
        raise SystemExit("stopped; the rows of the finished cases are kept") from None
    finally:
        if rows:
            print(table(rows, COLUMNS), flush=True)
            page.present("decoder", options.out)
