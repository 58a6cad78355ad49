"""Run the tests of `interpreted/` in a process where Triton interprets kernels instead of compiling them."""

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT


def test_interpreted_kernels() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("this process collects them itself")
    folder = "tests/ops/kernels/interpreted"
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", folder],
        cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
