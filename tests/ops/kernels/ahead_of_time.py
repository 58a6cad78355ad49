"""Compile the kernel that an op would launch, without a GPU, and read its resource usage."""

import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
WORDS = "STL|LDL", "HGMMA", r"WARPGROUP\.ARRIVE"
SHARED = {80: 166912, 90: 232448, 100: 232448}  # most bytes of shared memory per program, by architecture


@dataclass(frozen=True)
class _Absent:
    """A driver with the methods that compiling needs. Kernels are cached per device: one per architecture."""

    arch: int

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0


@dataclass(frozen=True)
class Compiled:
    """Resources of a compiled kernel.

    registers: per thread. stack, shared: bytes. spills: instructions that spill registers. serial: True if
    each Hopper matrix instruction waits for the one before. The assembler makes them wait if it cannot prove
    that nothing touches the accumulators in between.
    """

    registers: int
    stack: int
    spills: int
    shared: int
    serial: bool
    ptx: str


def _tool(name: str, *arguments: str | Path) -> str:
    return subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout


def _read(kernel) -> Compiled:
    with TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(kernel.asm["cubin"])
        usage = re.search(r"REG:(\d+) STACK:(\d+)", _tool("cuobjdump", "--dump-resource-usage", binary))
        code = _tool("nvdisasm", "-c", binary)
    assert usage is not None
    spills, products, fences = (len(re.findall(rf"\b(?:{word})\b", code)) for word in WORDS)
    serial, asm = 0 < products <= fences, kernel.asm["ptx"]
    return Compiled(int(usage[1]), int(usage[2]), spills, kernel.metadata.shared, serial, asm)


def compiled(arch: int, launch: Callable, *arguments) -> Compiled:
    """Compile the one kernel that launch(*arguments) starts for sm_{arch}; tensors are on `meta`."""
    found = []
    run = JITFunction.run

    def stop_short(kernel, *arguments, grid, warmup, **options):
        found.append(run(kernel, *arguments, grid=grid, warmup=True, **options))

    with patch.object(driver, "_active", _Absent(arch)), patch.object(JITFunction, "run", stop_short):
        launch(*arguments)
    (kernel,) = found
    return _read(kernel)


def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
