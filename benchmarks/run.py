"""Run a suite within a budget; keep rows as they come, then write a table, pictures and report.html.

python -m benchmarks                               quick, or gpu on a machine with a GPU
python -m benchmarks ffn --dtype float32 --only gpt2,timm --out DIR --budget 600
python -m benchmarks ffn --only gpt2 --base REV    compares this tree with another commit, in turn
python -m benchmarks gpu --device cpu              a dry run at toy sizes, to check that everything runs

Ctrl-C keeps the finished rows. Each job of the suite gpu has its own process; a failure affects only that
job.
"""

import argparse
import logging
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import page
from benchmarks.cases import DTYPES, Case
from benchmarks.implementations import IMPLEMENTATIONS
from benchmarks.report import CASE, Progress, arguments, check_device, commit, keep, listed, read, table
from benchmarks.runner import run_case
from benchmarks.suites import SUITES, Job, narrowed, toy

BUDGETS = {"quick": 60.0, "ffn": 1800.0, "gpu": 500.0}  # seconds
COLUMNS = [*CASE, "ms", "speedup", "low", "high", "of_ceiling", "saved_per_token", "peak_MB", "error"]
COLUMNS += ["setup_s", "note"]
BEARABLE = 3.5e11  # FLOPs per call on a CPU: a second or two on two cores
RESERVE = 6.0  # seconds of the budget for the pictures


def options_of(suite: str, argv: list[str]) -> argparse.Namespace:
    parser = arguments(suite, __doc__)
    here = "cuda" if torch.cuda.is_available() else "cpu"
    default = "cuda" if suite == "gpu" else here
    parser.add_argument("--device", type=check_device, choices=("cuda", "cpu"), default=default)
    parser.add_argument(
        "--dtype",
        type=listed(*DTYPES),
        default=list(DTYPES),
        help=f"any of {', '.join(DTYPES)}, comma-separated",
    )
    parser.add_argument(
        "--only", type=listed(), default=[], help="blocks and implementations, comma-separated"
    )
    parser.add_argument("--budget", type=float, default=BUDGETS[suite], help="seconds (default: %(default)s)")
    parser.add_argument("--base", metavar="REV", help="compare ffn with that of this commit instead")
    parser.add_argument("--job", type=int, help=argparse.SUPPRESS)  # run one job in this process
    return parser.parse_args(argv)


def main(suite: str, argv: list[str]) -> None:
    options, begun = options_of(suite, argv), time.monotonic()
    commit()  # read now, not when the rows are written
    try:
        jobs = narrowed(SUITES[suite](), options.dtype, options.only)
    except ValueError as error:
        raise SystemExit(f"python -m benchmarks {suite}: {error}") from None
    if suite == "gpu" and options.device == "cpu":
        jobs = [replace(job, cases=tuple(map(toy, job.cases)), seconds=0.0) for job in jobs]
    if options.base:
        from benchmarks import base

        cases = list(dict.fromkeys(case for job in jobs for case in job.cases))
        names = [name for name in options.only if name in IMPLEMENTATIONS] or ["ffn"]
        base.main(options.base, cases, names, device=options.device, budget=options.budget)
        return
    if options.job is not None:
        jobs = [jobs[options.job]]
    apart = suite == "gpu" and options.job is None
    for talker in ("torchao", "torch.utils._pytree"):  # they report failed imports of optional parts
        logging.getLogger(talker).setLevel(logging.ERROR)

    def left() -> float:
        return options.budget - RESERVE - (time.monotonic() - begun)

    file = options.out / f"{suite}.jsonl"
    before = len(read(file))
    stopped = False
    try:
        run_all(suite, jobs, options, left, apart)
    except KeyboardInterrupt:
        stopped = True
    rows = read(file)[before:]
    if stopped:
        print(f"\nstopped: {len(rows)} rows are in {file}", file=sys.stderr)
    if options.job is None and rows:
        print(f"\n{table(rows, COLUMNS)}\n\n{time.monotonic() - begun:.0f} s", flush=True)
        page.present(suite, options.out)


def run_all(
    suite: str, jobs: list[Job], options: argparse.Namespace, left: Callable[[], float], apart: bool
) -> None:
    """Keep rows as they come: per job if jobs run in their own processes (`apart`), else per case."""
    todo = sum(effort(case, job) for job in jobs for case in job.cases)
    with Progress(todo, quiet=options.job is not None) as advance:
        for number, job in enumerate(jobs):
            if apart:
                in_a_process(suite, number, job, options, min(left(), job.limit))
                advance(sum(effort(case, job) for case in job.cases), "")
                continue
            for case in job.cases:
                advance(0, str(case))
                keep(suite, rows_of(case, job, options, left()), options.out)
                advance(effort(case, job), "")


def rows_of(case: Case, job: Job, options: argparse.Namespace, left: float) -> list[dict]:
    if left <= 0:
        return missing(job, (case,), [], spent(options), options.device)
    if options.device == "cpu" and case.flops > BEARABLE:
        return missing(job, (case,), [], "skipped: a call would take seconds on a CPU", options.device)
    builders = {name: IMPLEMENTATIONS[name] for name in job.names}
    return run_case(case, builders, torch.device(options.device), seconds=job.seconds)


def effort(case: Case, job: Job) -> float:
    """Estimate the seconds of a case on two cores."""
    if case.flops > BEARABLE:
        return 0.1
    return job.seconds + len(job.names) * (0.2 + 8 * case.flops / 3e11)


def in_a_process(suite: str, number: int, job: Job, options: argparse.Namespace, seconds: float) -> None:
    """Run a job in a process, which keeps its rows; then add rows with a reason for the missing ones."""
    file = options.out / f"{suite}.jsonl"
    before = len(read(file))
    why = spent(options)
    if seconds > 15:  # less is too short to start a process and compile
        command = [sys.executable, "-m", "benchmarks", suite, "--job", str(number), "--out", str(options.out)]
        command += ["--device", options.device, "--dtype", ",".join(options.dtype)]
        command += ["--only", ",".join(options.only)] if options.only else []
        try:
            code = subprocess.run(command, cwd=Path(__file__).parents[1], timeout=seconds).returncode
            why = f"its process ended with code {code}"
        except subprocess.TimeoutExpired:
            why = f"skipped: not done in the {seconds:.0f} s it was given"
    keep(suite, missing(job, job.cases, read(file)[before:], why, options.device), options.out)


def spent(options: argparse.Namespace) -> str:
    return f"skipped: the budget of {options.budget:.0f} s is spent"


def missing(job: Job, cases: tuple[Case, ...], rows: list[dict], why: str, device: str) -> list[dict]:
    """Return a row with the reason for each case and implementation without a row."""

    def key(row: dict) -> tuple:
        return tuple(row[name] for name in (*cases[0].columns(), "implementation"))

    done = {key(row) for row in rows}
    wanted = [case.columns() | {"implementation": name} for case in cases for name in job.names]
    return [row | {"device": device, "note": why} for row in wanted if key(row) not in done]
