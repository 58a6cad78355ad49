"""Choose the backend that runs, and say why."""

import os
from dataclasses import dataclass
from importlib.util import find_spec
from shutil import which
from types import ModuleType

import torch

from ffn.ops import eager, hardware
from ffn.ops.torch_modes import constant_in_graphs

BACKENDS = ("auto", "eager", "triton", "reference")
OLDEST = (8, 0)  # compute capability that the kernels are written for


@dataclass(frozen=True)
class Choice:
    """The backend that runs and the reason."""

    backend: str
    reason: str


def module(backend: str) -> ModuleType:
    """The module of a backend with passes: "eager" or "triton"."""
    if backend == "triton":
        from ffn.ops.kernels import backend as kernels

        return kernels
    return eager


def check_backend(backend: str) -> None:
    """Raise ValueError for a name that is not in BACKENDS."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}")


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


@constant_in_graphs
def why_not_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason why the kernels cannot run on such inputs; None if they can."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"no kernel takes {str(dtype)[6:]}"
    if find_spec("triton") is None:
        return "the package triton is not installed"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if device.type != "cuda" or torch.version.hip is not None:
        other = "ROCm" if device.type == "cuda" else device.type
        return f"the kernels run on NVIDIA GPUs, not on {other}"
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST:
        return f"the GPU's compute capability is {_dotted(capability)}; {_dotted(OLDEST)} is the least"
    if not (os.environ.get("CC") or which("gcc") or which("clang")):
        return "Triton finds no C compiler (gcc, clang or what CC names)"
    return None


def choose(backend: str, device: torch.device, dtype: torch.dtype) -> Choice:
    """The backend for inputs of that device and dtype.

    Raises:
        ValueError: no backend of that name, or "triton" where it cannot run.
    """
    check_backend(backend)
    if backend == "reference":
        return Choice("reference", "asked for by name: the textbook, with plain autograd")
    if torch.compiler.is_compiling():
        if backend == "triton":
            raise ValueError(
                "backend must be 'auto' under torch.compile, which fuses the passes; got 'triton'"
            )
        return Choice("compiled", "the compiler fuses what stands between the products")
    asked = "asked for by name"
    if backend == "triton" or (backend == "auto" and device.type == "cuda"):
        reason = why_not_triton(device, dtype)
        if reason is None:
            return Choice("triton", asked if backend == "triton" else "kernels serve this GPU")
        if backend == "triton":
            raise ValueError(f"backend must be 'auto' or 'eager' here: {reason}; got 'triton'")
    else:
        reason = asked if backend == "eager" else f"torch ops serve {device.type} {str(dtype)[6:]}"
    if device.type == "cpu" and dtype == torch.float32 and hardware.float32_faster_in_onednn():
        reason += ", products in oneDNN, faster than MKL on this processor"
    elif device.type == "cpu" and dtype == torch.bfloat16 and hardware.bfloat16_in_onednn():
        reason += ", products in oneDNN"
    return Choice("eager", reason)
