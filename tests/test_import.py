"""Import in a fresh Python: no optional package is needed or imported, and nothing warns."""

import subprocess
import sys

import ffn
from tests.conftest import ROOT

OPTIONAL = ["triton", "tqdm", "matplotlib", "tokenizers", "transformers"]


def run_python(code: str, *options: str) -> str:
    done = subprocess.run([sys.executable, *options, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_cpu_path_runs_without_optional_packages() -> None:
    code = f"""
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {OPTIONAL!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
import torch
import ffn

for activation in ("gelu", "swiglu"):
    block = ffn.FeedForward(8, 16, dropout=0.1, activation=activation)
    block(torch.randn(3, 8)).sum().backward()
    assert all(p.grad is not None for p in block.parameters())
    block.eval()(torch.randn(2, 3, 8))
print("ran")
"""
    assert run_python(code).split() == ["ran"]


def test_import_loads_no_optional_package_and_no_compiler() -> None:
    heavy = [*OPTIONAL, "torch._dynamo", "torch._inductor"]
    code = f"""
import sys
import torch
before = set(sys.modules)
import ffn
print(*sorted((set(sys.modules) - before) & set({heavy!r})))
"""
    assert run_python(code).split() == []


def test_import_warns_of_nothing() -> None:
    run_python("import ffn", "-W", "error")


def test_dir_lists_the_public_names_and_no_submodules() -> None:
    names = {name for name in dir(ffn) if not name.startswith("__")}
    assert names == set(ffn.__all__)
    assert all(hasattr(ffn, name) for name in dir(ffn))
