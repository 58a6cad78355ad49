"""Compiles what an op would launch for a GPU that need not be there, and reads what it takes of one."""

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
SHARED = {80: 166912, 90: 232448, 100: 232448}  # bytes of shared memory a program can have, by architecture


@dataclass(frozen=True)
class _Absent:
    """As much of a driver as compiling asks for; kernels are kept by device, so each architecture is one."""

    arch: int

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0


@dataclass(frozen=True)
class Compiled:
    """registers a thread; stack and shared in bytes; spills: instructions that move registers to and fro.

    serial: whether each matrix instruction of a Hopper GPU waits for the last, as the assembler has it where
    it cannot tell that nothing touches the sums between two.
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
    """The one kernel that launch(*arguments) starts, compiled for sm_{arch}; tensors are on `meta`."""
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
