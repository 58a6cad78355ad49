"""Options, rows and tables: JSON lines with machine, versions and commit; Markdown tables."""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"  # the rows in the repository
OUT = Path("runs/benchmarks")


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Return the processor's name, family and model; virtual machines give several generations one name."""
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    if "model name" not in facts:
        return platform.processor() or platform.machine()
    return facts["model name"] + "".join(
        f", {key} {facts[key]}" for key in ("cpu family", "model") if key in facts
    )


@cache  # the commit at the start, however long the run takes
def commit() -> str:
    """Return the checkout's commit, with a plus if the code differs from it; empty outside a checkout."""

    def git(*words: str) -> str:
        command = ["git", "-C", os.fspath(RESULTS.parents[1]), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "-uno", "--", "ffn", "benchmarks", ":!benchmarks/results")
        return git("rev-parse", "--short=10", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def version(package: str) -> str:
    """Return the package's name and installed version."""
    try:
        return f"{package} {metadata.version(package)}"
    except metadata.PackageNotFoundError:
        return f"no {package}"


def clocks() -> dict[str, float]:
    """Return the current clocks of the processor and the GPU in MHz, if the machine reports them."""
    found: dict[str, float] = {}
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    cores = [float(line.split(":")[1]) for line in lines if line.startswith("cpu MHz")]
    if cores:
        found["cpu_MHz"] = round(sum(cores) / len(cores))
    if torch.cuda.is_available():
        with suppress(Exception):  # NVIDIA's management library is absent or fails
            found["gpu_MHz"] = torch.cuda.clock_rate()
    return found


def machine() -> dict[str, object]:
    facts = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu": cpu_model(),
        "commit": commit(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    facts |= clocks()
    with suppress(AttributeError, OSError):  # not available on Windows
        facts["load"] = round(os.getloadavg()[0], 1)
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        facts |= {"gpu": gpu.name, "capability": f"{gpu.major}.{gpu.minor}", "gpu_bytes": gpu.total_memory}
        facts |= {"cuda": torch.version.cuda, "triton": version("triton")}
    return facts


def machine_words(row: dict) -> str:
    """Describe the machine of a row in a few words."""
    threads = row.get("threads", "?")
    cpu = f"{row.get('cpu', 'unnamed machine')}, {threads} thread{'s' * (threads != 1)}"
    where = row.get("gpu") or cpu
    return f"{where}, torch {row.get('torch', '?')}"


def cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return "" if value is None else str(value)


def lines_of(columns: list[str], rows: list[list[str]]) -> list[str]:
    """Return the lines of a Markdown table."""
    head = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    return head + [f"| {' | '.join(row)} |" for row in rows]


def table(rows: list[dict], columns: list[str]) -> str:
    """Return a Markdown table of the named columns, without those that no row fills."""
    columns = [column for column in columns if any(row.get(column) not in (None, "") for row in rows)]
    return "\n".join(lines_of(columns, [[cell(row.get(column)) for column in columns] for row in rows]))


def arguments(name: str, description: str | None, *, keeps_rows: bool = True) -> argparse.ArgumentParser:
    """Return the argument parser of one benchmark, with its module's docstring as help."""
    parser = argparse.ArgumentParser(
        f"python -m benchmarks {name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if keeps_rows:
        told = "the folder for the rows (default: %(default)s)"
        parser.add_argument("--out", type=check_folder, default=str(OUT), help=told)
    return parser


def check_folder(text: str) -> Path:
    """Return the path of a folder that exists or can be created."""
    there = path = Path(text).absolute()
    while not os.access(there, os.F_OK):
        there = there.parent
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        raise argparse.ArgumentTypeError(f"must be a writable folder, got {path}; {there} is none")
    return path


def check_device(text: str) -> str:
    if text == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("must be cpu: torch sees no GPU")
    return text


def check_count(text: str) -> int:
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text}")
    return int(text)


def listed(*known: str) -> Callable[[str], list[str]]:
    """Return a parser of comma-separated words; if `known` is given, other words are errors."""

    def split(text: str) -> list[str]:
        found = text.split(",")
        if known and (unknown := [word for word in found if word not in known]):
            raise argparse.ArgumentTypeError(f"must be among {', '.join(known)}; got {','.join(unknown)}")
        return found

    return split


def publish(name: str, rows: list[dict], columns: list[str], folder: Path) -> None:
    """Print the table and append the rows to FOLDER/NAME.jsonl."""
    print(f"{machine_words(machine())}\n\n{table(rows, columns)}", flush=True)
    keep(name, rows, folder)


def keep(name: str, rows: list[dict], folder: Path) -> None:
    """Append the rows, each with the machine's facts, to FOLDER/NAME.jsonl."""
    facts, path = machine(), folder / f"{name}.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    torn = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")  # a killed process left half a line
    with path.open("a") as file:
        file.write("\n" * torn + "".join(json.dumps({**row, **facts}) + "\n" for row in rows))


def read(file: Path) -> list[dict]:
    """Return the rows of a file; none if it does not exist."""
    rows = []
    for line in file.read_text("utf-8").splitlines() if file.exists() else []:
        with suppress(json.JSONDecodeError):  # half a line of a killed process
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]


CASE = ("work", "shape", "block", "case", "batch", "tokens", "new_tokens")
CASE += ("dtype", "dropout", "implementation")
MACHINE = ("cpu", "gpu", "device", "threads", "torch")


def values(row: dict, keys: tuple[str, ...]) -> tuple:
    return tuple(row.get(key) for key in keys)


def machine_of(row: dict) -> tuple:
    return values({"device": "cuda" if "gpu" in row else "cpu"} | row, MACHINE)


def newest(rows: list[dict]) -> list[dict]:
    """Return the last row of each case and implementation, from the machine of the last row."""
    here = [row for row in rows if machine_of(row) == machine_of(rows[-1])]
    return list({values(row, CASE): row for row in here}.values())


def last_runs(rows: list[dict]) -> list[dict]:
    """Return the newest rows from each case's last run: one call of `keep` wrote these interleaved rows."""
    last: dict[tuple, str] = {}
    for row in rows:
        case = values(row, CASE[:-1])
        last[case] = max(last.get(case, ""), row["time"])
    return [row for row in rows if row["time"] == last[values(row, CASE[:-1])]]


def reason(error: BaseException) -> str:
    """Return an error as one line for a row."""
    text = f"{type(error).__name__}: {error}".strip().splitlines()[0][:120]
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error):
        return "out of memory"
    return str(error) if type(error) is ValueError else text


class Progress:
    """A progress bar with the time left if tqdm is installed, else a line per case."""

    def __init__(self, total: float, quiet: bool = False):
        self.bar, self.quiet = None, quiet
        if not quiet and find_spec("tqdm") is not None:
            from tqdm import tqdm

            shape = "{l_bar}{bar}| {elapsed} of about {remaining} more  {postfix}"
            self.bar = tqdm(total=1.0001 * total, bar_format=shape, leave=False)

    def __enter__(self) -> Callable[[float, str], None]:
        return self.advance

    def __exit__(self, *_) -> None:
        if self.bar is not None:
            self.bar.close()

    def advance(self, done: float, now: str) -> None:
        if self.bar is not None:
            self.bar.set_postfix_str(now, refresh=True)
            self.bar.update(done)
        elif now and not self.quiet:
            print(now, file=sys.stderr, flush=True)
