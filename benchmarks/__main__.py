"""``python -m benchmarks NAME [options]``: the names are in the package's docstring, -h gives the options."""

import importlib
import sys

NAMES = ("block", "training_step", "generation", "shakespeare", "gpu", "tune", "readme", "compare")


def main(argv: list[str]) -> int:
    if not argv or argv[0] not in NAMES:
        print(f"python -m benchmarks wants one of {', '.join(NAMES)}; got {' '.join(argv) or 'nothing'}")
        return 2
    importlib.import_module(f"benchmarks.{argv[0]}").main(argv[1:])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
