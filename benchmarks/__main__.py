"""Run a benchmark: ``python -m benchmarks [NAME] [options]``; -h lists names and options."""

import importlib
import sys

import benchmarks

SUITES = ("quick", "ffn", "gpu")
PROGRAMS = ("decoder", "shakespeare", "classification", "loading", "coverage", "tune", "readme", "compare")


def main(argv: list[str]) -> int:
    if argv[:1] in (["-h"], ["--help"]):
        print(benchmarks.__doc__)
        return 0
    name = argv[0] if argv and not argv[0].startswith("-") else default()
    rest = argv[1:] if argv[:1] == [name] else argv
    if name in SUITES:
        importlib.import_module("benchmarks.run").main(name, rest)
    elif name in PROGRAMS:
        importlib.import_module(f"benchmarks.{name}").main(rest)
    else:
        known = ", ".join(SUITES + PROGRAMS)
        print(f"python -m benchmarks: NAME must be one of {known}, got {name}", file=sys.stderr)
        return 2
    return 0


def default() -> str:
    import torch

    return "gpu" if torch.cuda.is_available() else "quick"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
