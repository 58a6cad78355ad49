"""Tests of the kernels' numbers on the CPU, collected only if TRITON_INTERPRET=1 was set at start.

Triton decides at import whether it interprets or compiles kernels, so a process can do only one of the two.
`tests/ops/kernels/test_interpreted.py` runs this folder in a process of its own.
"""

import os
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETED else ["test_*.py"]

if INTERPRETED and find_spec("triton") is not None:
    from tests.ops.kernels.interpreted import shim

    shim.install()


def pytest_collect_file(file_path: Path) -> None:
    if file_path.name.startswith("test_") and find_spec("triton") is None:
        pytest.skip("triton is not installed")


@pytest.fixture(autouse=True)
def _quiet():
    """Silence NumPy's overflow warnings: a GPU overflows silently."""
    with np.errstate(all="ignore"):
        yield
