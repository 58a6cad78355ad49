"""Choose device and precision, with a reason to print; keep freed memory."""

from __future__ import annotations

import ctypes
import sys
from contextlib import AbstractContextManager
from typing import Literal

import torch

Precision = Literal["auto", "float32", "bfloat16"]


def choose_device(name: str) -> tuple[torch.device, str]:
    """Return a device and the reason for it.

    Args:
        name: a torch device, or "auto": cuda if available, else mps, else cpu.

    Raises:
        ValueError: the device is not available here.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda"), f"CUDA is available: {torch.cuda.get_device_name()}"
        if torch.backends.mps.is_available():
            return torch.device("mps"), "no CUDA, and Metal is available"
        return torch.device("cpu"), f"neither CUDA nor Metal is available; {torch.get_num_threads()} threads"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device must be auto, cpu, cuda, cuda:1 or mps, got {name}") from None
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if not torch.cuda.is_available():
            built = "finds no CUDA device" if torch.version.cuda else "is built without CUDA"
            raise ValueError(
                f"device={name}: this torch {torch.__version__} {built}; use device=auto or device=cpu"
            )
        if (device.index or 0) >= count:
            raise ValueError(
                f"device must be at most cuda:{count - 1}, the last of {count} CUDA devices, got {name}"
            )
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"device={name}: Metal is not available here; use device=auto or device=cpu")
    elif device.type not in ("cpu", "mps"):
        raise ValueError(f"device must be on cpu, cuda or mps, got {name}")
    return device, "as asked"


def choose_precision(name: Precision, device: torch.device) -> tuple[Precision, str]:
    """Return float32 or bfloat16 (autocast) and the reason; "auto" is bfloat16 where it is native."""
    if name != "auto":
        return name, "as asked"
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return "bfloat16", "this GPU multiplies bfloat16 natively"
    # oneDNN's own answer is yes on any AVX-512, but without AVX512_BF16 it emulates the matmuls.
    if device.type == "cpu" and torch.cpu._is_avx512_bf16_supported():
        return "bfloat16", "this CPU multiplies bfloat16 natively"
    return "float32", "no native bfloat16 products here"


def keep_freed_memory() -> bool:
    """Let the C library keep freed memory instead of returning it to the system; False if it cannot.

    Training frees and allocates the same large buffers in every step. By default glibc returns them to the
    system, and their pages are cleared and mapped again each time: up to a fifth of a step on the CPU.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return False
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3
    settings = ((mmap_threshold, 1 << 30), (trim_threshold, (1 << 31) - 1), (top_pad, 1 << 28))
    return all(mallopt(key, value) for key, value in settings)


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager:
    """Return the context of a forward pass: autocast to bfloat16 if that is the precision."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")
