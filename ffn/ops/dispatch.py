"""Which backend runs: the only file that asks what hardware or package exists."""

import platform
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

BACKENDS = ("auto", "eager", "reference")


@dataclass(frozen=True)
class Choice:
    """What runs and why. onednn: float32 products go to oneDNN."""

    backend: str
    reason: str
    onednn: bool = False


@cache
def _cpu_vendor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("vendor_id"):
                return line.split(":")[1].strip()
    return platform.processor()


@cache
def onednn_beats_mkl() -> bool:
    """Whether float32 products are faster in oneDNN and remain float32 there.

    MKL serves AMD's processors poorly. With AMX tiles, and off x86, the same setting would round to bfloat16.
    """
    return (
        "AMD" in _cpu_vendor()
        and torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
        and not torch.cpu._is_amx_tile_supported()
        and hasattr(torch.backends.mkldnn, "matmul")
    )


def check_backend(backend: str) -> None:
    """Raise ValueError for a name that is not in BACKENDS."""
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: no such backend; choose one of {', '.join(BACKENDS)}")


@cache
def _choose(backend: str, device: str, dtype: torch.dtype) -> Choice:
    check_backend(backend)
    if backend == "reference":
        return Choice("reference", "asked for by name: the textbook, with plain autograd")
    asked = "asked for by name" if backend == "eager" else f"torch ops serve {device} {str(dtype)[6:]}"
    onednn = device == "cpu" and dtype == torch.float32 and onednn_beats_mkl()
    products = "; float32 products in oneDNN, faster than MKL on this processor" if onednn else ""
    return Choice("eager", asked + products, onednn)


def choose(backend: str, x: Tensor) -> Choice:
    """The backend for an input.

    Raises:
        ValueError: no backend of that name.
    """
    if torch.compiler.is_compiling():  # the compiler owns the products; nothing to ask
        return Choice("reference" if backend == "reference" else "eager", "compiled")
    return _choose(backend, x.device.type, x.dtype)
