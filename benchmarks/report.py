"""Options in, rows out: a Markdown table to read, JSON lines with machine, version and commit to keep."""

import argparse
import json
import os
import platform
import subprocess
import time
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


def machine() -> dict[str, object]:
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu": cpu_model(),
        "commit": commit(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return "" if value is None else str(value)


def table(rows: list[dict], columns: list[str]) -> str:
    """A Markdown table of the named columns; a row that lacks one leaves it empty."""
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(cell(row.get(column)) for column in columns) + " |" for row in rows]
    return "\n".join(lines)


def arguments(name: str, description: str | None) -> argparse.ArgumentParser:
    """The parser of one benchmark, its module's docstring shown as written."""
    parser = argparse.ArgumentParser(
        f"python -m benchmarks {name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder that keeps the rows")
    return parser


def publish(name: str, rows: list[dict], columns: list[str], folder: Path) -> None:
    """Print the table and append the rows to FOLDER/NAME.jsonl."""
    facts = machine()
    print(f"{facts['cpu']}, {facts['threads']} threads, torch {facts['torch']}\n")
    print(table(rows, columns), flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.jsonl").open("a") as file:
        file.writelines(json.dumps({**row, **facts}) + "\n" for row in rows)
