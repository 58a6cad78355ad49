"""Probe what the CPU and the torch build support: oneDNN, its int8 and bfloat16 matmuls, FBGEMM.

Each answer is cached for the process. Where an op can be run, it is run and its result is checked.
"""

import platform
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch

_PLAIN: dict = {
    "dtype": torch.float32,
    "device": "cpu",
}  # explicit, so that the caller's defaults do not matter


@cache
def _cpu_vendor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("vendor_id"):
                return line.split(":")[1].strip()
    return platform.processor()


def _holds(probe: Callable[[], bool]) -> bool:
    """True if the probe runs and returns True; False where torch's private op is missing.

    It runs in a thread of its own, where none of the caller's traces and modes is active.
    """
    with ThreadPoolExecutor(1) as thread:
        try:
            return thread.submit(probe).result()
        except (AttributeError, RuntimeError):  # some builds lack the op
            return False


@cache
def _has_onednn_linear() -> bool:
    def probe() -> bool:
        x = torch.ones(1, 1, **_PLAIN)
        return bool(torch.ops.mkldnn._linear_pointwise.default(x, x, None, "none", [], "") == 1)

    return _holds(probe)


@cache
def float32_faster_in_onednn() -> bool:
    """True if float32 matmuls are faster in oneDNN than in MKL, and stay float32 there.

    MKL is slow on AMD processors. With AMX tiles, and off x86, the same setting would round to bfloat16.
    """
    return (
        "AMD" in _cpu_vendor()
        and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
        and not torch.cpu._is_amx_tile_supported()
        and hasattr(torch.backends.mkldnn, "matmul")
        and _has_onednn_linear()
    )


@cache
def bfloat16_in_onednn() -> bool:
    """True if oneDNN supports bfloat16 matmuls here, in hardware or emulated; torch uses oneDNN for them."""
    return _has_onednn_linear() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def packs(dtype: torch.dtype) -> bool:
    """True if oneDNN can pack a weight of this dtype on the CPU into its own layout."""
    if dtype == torch.bfloat16:
        return bfloat16_in_onednn()
    return dtype == torch.float32 and _has_onednn_linear()


@cache
def int8_in_onednn() -> bool:
    """True if oneDNN has int8 matmuls here that do not saturate, which needs int8 instructions (VNNI)."""

    def probe() -> bool:
        x = torch.full((1, 64), 255, dtype=torch.uint8, device="cpu")
        weight = torch.full((16, 64), 127, dtype=torch.int8, device="cpu")
        one, zero = torch.ones(16, **_PLAIN), torch.zeros(16, dtype=torch.int64, device="cpu")
        laid_out = torch.ops.onednn.qlinear_prepack.default(weight, None)
        product = torch.ops.onednn.qlinear_pointwise.default
        y = product(x, 1.0, 128, laid_out, one, zero, None, 1.0, 0, torch.float32, "none", [], "")
        return bool((y == 64 * 127 * 127).all())

    return platform.machine() in ("x86_64", "AMD64") and _holds(probe)


@cache
def int8_in_fbgemm() -> bool:
    """True if FBGEMM has int8 matmuls here that do not saturate; torch plans to remove FBGEMM."""

    def probe() -> bool:
        values = torch.full((16, 64), 127, dtype=torch.int8, device="cpu")
        laid_out = fbgemm_layout(values, torch.ones(16, **_PLAIN), None)
        y = torch.ops.quantized.linear_dynamic.default(torch.ones(1, 64, **_PLAIN), laid_out, False)
        return bool((y - 64 * 127).abs().max() < 1)

    return _holds(probe)


def fbgemm_layout(
    values: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
) -> torch.ScriptObject:
    """Pack int8 values (out, in), a scale per row (out) and a float32 bias (out) into FBGEMM's layout."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's warning that it will remove such tensors
        zeros = torch.zeros(len(values), dtype=torch.int64, device="cpu")
        quantized = torch._make_per_channel_quantized_tensor  # pyright: ignore[reportPrivateImportUsage]
        weight = quantized(values, scales.double(), zeros, 0)
        return torch.ops.quantized.linear_prepack.default(weight, bias)
