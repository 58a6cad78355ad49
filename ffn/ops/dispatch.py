"""Choose the backend for a call and give the reason."""

import os
from dataclasses import dataclass
from importlib.util import find_spec
from shutil import which
from types import ModuleType

import torch

from ffn.ops import eager, hardware
from ffn.ops.torch_modes import constant_in_graphs

BACKENDS = ("auto", "eager", "triton", "reference")
OLDEST = (8, 0)  # lowest compute capability that the kernels support


@dataclass(frozen=True)
class Choice:
    """The chosen backend and the reason for the choice."""

    backend: str
    reason: str


def module(backend: str) -> ModuleType:
    """Return the module that implements a backend: "triton", else eager."""
    if backend == "triton":
        from ffn.ops.kernels import backend as kernels

        return kernels
    return eager


def check_backend(backend: str) -> None:
    """Raise ValueError if backend is not in BACKENDS."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


@constant_in_graphs
def why_not_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why the kernels cannot run for this device and dtype, or None if they can."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the kernels do not support {str(dtype)[6:]}"
    if find_spec("triton") is None:
        return "the package triton is not installed"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if device.type != "cuda" or torch.version.hip is not None:
        other = "ROCm" if device.type == "cuda" else device.type
        return f"the kernels run on NVIDIA GPUs, not on {other}"
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST:
        return f"the GPU has compute capability {_dotted(capability)}, the kernels need {_dotted(OLDEST)}"
    if not (os.environ.get("CC") or which("gcc") or which("clang")):
        return "Triton finds no C compiler (gcc, clang or $CC)"
    return None


def choose(backend: str, device: torch.device, dtype: torch.dtype) -> Choice:
    """Return the backend for inputs of this device and dtype.

    Raises:
        ValueError: backend is unknown, or it is "triton" and the kernels cannot run here.
    """
    check_backend(backend)
    if backend == "reference":
        return Choice("reference", "requested by name: the reference formula under plain autograd")
    if torch.compiler.is_compiling():
        if backend == "triton":
            raise ValueError(
                "backend must be 'auto' under torch.compile, which fuses the passes, got 'triton'"
            )
        return Choice("compiled", "torch.compile fuses the passes between the products")
    asked = "requested by name"
    if backend == "triton" or (backend == "auto" and device.type == "cuda"):
        reason = why_not_triton(device, dtype)
        if reason is None:
            return Choice("triton", asked if backend == "triton" else "the kernels run on this GPU")
        if backend == "triton":
            raise ValueError(f"backend must be 'auto' or 'eager', got 'triton': {reason}")
    else:
        reason = asked if backend == "eager" else f"torch ops run {str(dtype)[6:]} on {device.type}"
    if device.type == "cpu" and dtype == torch.float32 and hardware.float32_faster_in_onednn():
        reason += ", products in oneDNN, which is faster than MKL on this processor"
    elif device.type == "cpu" and dtype == torch.bfloat16 and hardware.bfloat16_in_onednn():
        reason += ", products in oneDNN"
    return Choice("eager", reason)
