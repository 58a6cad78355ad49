"""Ask what the CPU and torch's build can do: oneDNN, its int8 and bfloat16 products, FBGEMM.

Each answer is found once a process, by running the op and looking at its result.
"""

import platform
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch

_PLAIN: dict = {"dtype": torch.float32, "device": "cpu"}  # of a probe, whatever the caller's defaults are


@cache
def _cpu_vendor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("vendor_id"):
                return line.split(":")[1].strip()
    return platform.processor()


def _holds(probe: Callable[[], bool]) -> bool:
    """Whether the probe finds torch's private ops and what they should give.

    In a thread of its own, where no trace and no mode of the caller's is on.
    """
    with ThreadPoolExecutor(1) as thread:
        try:
            return thread.submit(probe).result()
        except (AttributeError, RuntimeError):  # absent from some builds
            return False


@cache
def _has_onednn_linear() -> bool:
    def probe() -> bool:
        x = torch.ones(1, 1, **_PLAIN)
        return bool(torch.ops.mkldnn._linear_pointwise.default(x, x, None, "none", [], "") == 1)

    return _holds(probe)


@cache
def float32_faster_in_onednn() -> bool:
    """Whether float32 products are faster in oneDNN than in MKL, and remain float32 there.

    MKL serves AMD's processors poorly. With AMX tiles, and off x86, the same setting would round to bfloat16.
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
    """Whether oneDNN takes bfloat16 products here, in hardware or emulated: torch sends it those anyway."""
    return _has_onednn_linear() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def packs(dtype: torch.dtype) -> bool:
    """Whether oneDNN can keep a weight of this dtype on the CPU in a layout of its own."""
    if dtype == torch.bfloat16:
        return bfloat16_in_onednn()
    return dtype == torch.float32 and _has_onednn_linear()


@cache
def int8_in_onednn() -> bool:
    """Whether oneDNN multiplies int8 here by instructions made for it, whose sums do not saturate (VNNI)."""

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
    """Whether FBGEMM multiplies int8 here and its sums do not saturate; torch means to drop it one day."""

    def probe() -> bool:
        values = torch.full((16, 64), 127, dtype=torch.int8, device="cpu")
        laid_out = fbgemm_layout(values, torch.ones(16, **_PLAIN), None)
        y = torch.ops.quantized.linear_dynamic.default(torch.ones(1, 64, **_PLAIN), laid_out, False)
        return bool((y - 64 * 127).abs().max() < 1)

    return _holds(probe)


def fbgemm_layout(
    values: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
) -> torch.ScriptObject:
    """FBGEMM's layout of int8 values (out, in), the unit of each row (out) and a float32 bias (out)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, that such tensors will be dropped
        zeros = torch.zeros(len(values), dtype=torch.int64, device="cpu")
        quantized = torch._make_per_channel_quantized_tensor  # pyright: ignore[reportPrivateImportUsage]
        weight = quantized(values, scales.double(), zeros, 0)
        return torch.ops.quantized.linear_prepack.default(weight, bias)
