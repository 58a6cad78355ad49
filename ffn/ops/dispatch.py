"""Which backend runs: the only file that asks what hardware or package exists."""

import os
import platform
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from shutil import which

import torch

from ffn.ops import compiled as traced
from ffn.ops import eager
from ffn.ops.library import constant_in_graphs

BACKENDS = ("auto", "eager", "triton", "reference")
OLDEST = (8, 0)  # compute capability that the kernels are written for
_PLAIN: dict = {"dtype": torch.float32, "device": "cpu"}  # of a probe, whatever the caller's defaults are
MODULES = {"eager": eager, "traced": traced}  # whose functions the rule calls


@dataclass(frozen=True)
class Choice:
    """What runs and why.

    onednn: products with a bias go straight to oneDNN. float32_in_onednn: so do all float32 products.
    """

    backend: str
    reason: str
    onednn: bool = False
    float32_in_onednn: bool = False


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


def check_backend(backend: str) -> None:
    """Raise ValueError for a name that is not in BACKENDS."""
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: no such backend; choose one of {', '.join(BACKENDS)}")


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


@constant_in_graphs
def why_not_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot run here on such inputs; None, with the kernels loaded, if they can."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"no kernel takes {str(dtype)[6:]}"
    if find_spec("triton") is None:
        return "the package triton is not installed"
    interpreted = device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    if not interpreted:
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
    from ffn.ops.kernels import backend

    MODULES["triton"] = backend
    return None


def choose(backend: str, device: torch.device, dtype: torch.dtype) -> Choice:
    """The backend for inputs of that device and dtype.

    Raises:
        ValueError: no backend of that name, or "triton" where it cannot run.
    """
    check_backend(backend)
    if backend == "reference":
        return Choice("reference", "asked for by name: the textbook, with plain autograd")
    asked = "asked for by name"
    if backend == "triton" or (backend == "auto" and device.type == "cuda"):
        reason = why_not_triton(device, dtype)
        if reason is None:
            return Choice("triton", asked if backend == "triton" else "kernels serve this GPU")
        if backend == "triton":
            raise ValueError(f"backend='triton' cannot run: {reason}; use 'auto' or 'eager'")
    else:
        reason = asked if backend == "eager" else f"torch ops serve {device.type} {str(dtype)[6:]}"
    if torch.compiler.is_compiling():
        return Choice("traced", "compiled: the compiler owns the products")
    if device.type == "cpu" and dtype == torch.float32 and float32_faster_in_onednn():
        return Choice("eager", f"{reason}, products in oneDNN, faster than MKL on this processor", True, True)
    if device.type == "cpu" and dtype == torch.bfloat16 and bfloat16_in_onednn():
        return Choice("eager", f"{reason}, products in oneDNN", True)
    return Choice("eager", reason)
