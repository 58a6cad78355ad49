"""Options in, rows out: a Markdown table to read, JSON lines with machine, version and commit to keep."""

import argparse
import json
import os
import platform
import subprocess
import time
from importlib import metadata
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def commit() -> str:
    """The checkout's commit, with a plus where files differ from it; empty outside a checkout."""
    git = ["git", "-C", os.fspath(RESULTS.parent), "describe", "--always", "--dirty=+", "--abbrev=10"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def version(package: str) -> str:
    """The package's name and installed version."""
    try:
        return f"{package} {metadata.version(package)}"
    except metadata.PackageNotFoundError:
        return f"no {package}"


def machine() -> dict[str, object]:
    facts = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu": cpu_model(),
        "commit": commit(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        facts |= {"gpu": gpu.name, "capability": f"{gpu.major}.{gpu.minor}", "gpu_bytes": gpu.total_memory}
        facts |= {"cuda": torch.version.cuda, "triton": version("triton")}
    return facts


def cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return "" if value is None else str(value)


def lines_of(columns: list[str], rows: list[list[str]]) -> list[str]:
    """The lines of a Markdown table."""
    head = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    return head + [f"| {' | '.join(row)} |" for row in rows]


def table(rows: list[dict], columns: list[str]) -> str:
    """A Markdown table of the named columns; a row that lacks one leaves it empty."""
    return "\n".join(lines_of(columns, [[cell(row.get(column)) for column in columns] for row in rows]))


def arguments(name: str, description: str | None, *, keeps_rows: bool = True) -> argparse.ArgumentParser:
    """The parser of one benchmark, its module's docstring shown as written."""
    parser = argparse.ArgumentParser(
        f"python -m benchmarks {name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if keeps_rows:
        parser.add_argument("--out", type=Path, default=RESULTS, help="the folder of the rows")
    return parser


def publish(name: str, rows: list[dict], columns: list[str], folder: Path) -> None:
    """Print the table and append the rows to FOLDER/NAME.jsonl."""
    facts = machine()
    where = facts.get("gpu", f"{facts['cpu']}, {facts['threads']} threads")
    print(f"{where}, torch {facts['torch']}\n")
    print(table(rows, columns), flush=True)
    keep(name, rows, folder)


def keep(name: str, rows: list[dict], folder: Path) -> None:
    """Append the rows, each with the machine's facts, to FOLDER/NAME.jsonl."""
    facts = machine()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.jsonl").open("a") as file:
        file.writelines(json.dumps({**row, **facts}) + "\n" for row in rows)


def read(file: Path) -> list[dict]:
    """The rows of a file; none where it is not there."""
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()] if file.exists() else []


CASE = ("block", "shape", "case", "batch", "tokens", "dtype", "mode", "dropout", "work", "implementation")
MACHINE = ("cpu", "gpu", "threads", "torch")


def newest(rows: list[dict]) -> list[dict]:
    """The last row of each case and implementation, from the machine that the last row of all is from."""
    here = [row for row in rows if all(row.get(key) == rows[-1].get(key) for key in MACHINE)]
    return list({tuple(row.get(key) for key in CASE): row for row in here}.values())
