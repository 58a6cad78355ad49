"""Every kernel compiles for each architecture, without a GPU, and spills no register.

The fused products are compiled with every tiling that can be chosen. Each architecture is tested with the
formulas that use the most and the fewest registers.
"""

import os

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton interprets kernels in this process", allow_module_level=True)

from benchmarks.tiles import CANDIDATES, CAPABILITIES
from ffn.activations import TABLE
from ffn.ops.kernels import act, dact, decode, linear_act, linear_dact, tilings
from ffn.ops.kernels.tilings import Tiling
from tests.ops.kernels.ahead_of_time import SHARED, Compiled, compiled, tensor

N, D, H = 8192, 1024, 4096
SHARED_ANYWHERE = 101376  # bytes per program available on any GPU of compute capability 8.0 or newer
MATRIX_INSTRUCTION = {90: "wgmma.mma_async", 100: "tcgen05.mma"}
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CASES = [  # activation, dropout, dtype, bias
    ("gelu", 0.1, BF16, True),
    ("mish", 0.1, FP16, True),
    ("relu", 0.0, BF16, True),
    ("geglu", 0.1, BF16, True),
    ("geglu", 0.0, BF16, False),
    ("swiglu", 0.1, FP16, False),
]

on_each = pytest.mark.parametrize("arch", SHARED)
on_those_that_fuse = pytest.mark.parametrize("arch", [10 * major for major in CAPABILITIES])
each_case = pytest.mark.parametrize(("name", "p", "dtype", "bias"), CASES)
each_pass = pytest.mark.parametrize(("name", "p", "dtype"), [case[:3] for case in CASES])


def choosable(arch: int, forward: bool, gated: bool) -> set[Tiling]:
    """Return the tilings that can run on sm_{arch}: those in the table and the first candidate."""
    form = tilings.key(forward, divmod(arch, 10), "bfloat16", gated, D, H, N).split(" bfloat16 ")[0]
    measured = {t for name, t in tilings._measured().items() if name.startswith(form)}
    return {t for t in (CANDIDATES[forward, gated][0], *measured) if t is not None}


def check(found: Compiled, shared: int) -> None:
    assert (found.spills, found.stack, found.serial) == (0, 0, False)
    assert found.shared <= shared


def seed(p: float) -> torch.Tensor | None:
    return tensor(1, dtype=torch.int64) if p > 0 else None


def with_gate(name: str, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    return t, t if TABLE[name].gated else None


def biases(name: str, dtype: torch.dtype, bias: bool) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    return with_gate(name, tensor(H, dtype=dtype)) if bias else (None, None)


def act_on(arch: int, name: str, p: float, dtype: torch.dtype) -> Compiled:
    pre = with_gate(name, tensor(N, H, dtype=dtype))
    return compiled(arch, act.act, *pre, seed(p), name, p, 0, 0)


def dact_on(arch: int, name: str, p: float, dtype: torch.dtype, outputs: bool) -> Compiled:
    dh = tensor(N, H, dtype=dtype)
    inputs = dh, *with_gate(name, dh), *with_gate(name, dh), seed(p)
    return compiled(arch, dact.dact_, *inputs, name, p, 0, 0, outputs, outputs)


def linear_act_on(
    arch: int, tiling: Tiling, name: str, p: float, dtype: torch.dtype, bias: bool, outputs: bool
) -> Compiled:
    weights = with_gate(name, tensor(H, D, dtype=dtype))
    inputs = tensor(N, D, dtype=dtype), *weights, *biases(name, dtype, bias), seed(p)
    return compiled(arch, linear_act.linear_act, *inputs, name, p, 0, 0, outputs, list(tiling))


def linear_dact_on(
    arch: int, tiling: Tiling, name: str, p: float, dtype: torch.dtype, outputs: bool
) -> Compiled:
    dy, down, pre = tensor(N, D, dtype=dtype), tensor(D, H, dtype=dtype), tensor(N, H, dtype=dtype)
    inputs = dy, down, *with_gate(name, pre), *with_gate(name, pre), seed(p)
    return compiled(arch, linear_dact.linear_dact, *inputs, name, p, 0, 0, outputs, outputs, list(tiling))


@on_each
@each_pass
def test_act(arch: int, name: str, p: float, dtype: torch.dtype) -> None:
    check(act_on(arch, name, p, dtype), SHARED_ANYWHERE)


@on_each
@each_pass
def test_dact(arch: int, name: str, p: float, dtype: torch.dtype) -> None:
    check(dact_on(arch, name, p, dtype, outputs=True), SHARED_ANYWHERE)


@on_each
@pytest.mark.parametrize("name", ["mish", "geglu"])
def test_float32_passes(arch: int, name: str) -> None:
    check(act_on(arch, name, 0.1, FP32), SHARED_ANYWHERE)
    check(dact_on(arch, name, 0.1, FP32, outputs=False), SHARED_ANYWHERE)


@on_each
@pytest.mark.parametrize("tokens", [1, 16, 32])
@pytest.mark.parametrize("name", ["gelu", "geglu"])
@pytest.mark.parametrize(("dtype", "width"), [(BF16, D), (FP16, D - 1), (FP32, D)])
def test_decode(arch: int, name: str, tokens: int, dtype: torch.dtype, width: int) -> None:
    weights = with_gate(name, tensor(H, width, dtype=dtype))
    inputs = tensor(tokens, width, dtype=dtype), *weights, *biases(name, dtype, bias=True)
    check(compiled(arch, decode.decode, *inputs, name), SHARED_ANYWHERE)


@on_those_that_fuse
@each_case
def test_linear_act(arch: int, name: str, p: float, dtype: torch.dtype, bias: bool) -> None:
    for tiling in choosable(arch, forward=True, gated=TABLE[name].gated):
        found = linear_act_on(arch, tiling, name, p, dtype, bias, outputs=True)
        check(found, SHARED[arch])
        assert MATRIX_INSTRUCTION[arch] in found.ptx


@on_those_that_fuse
@each_case
def test_linear_dact(arch: int, name: str, p: float, dtype: torch.dtype, bias: bool) -> None:
    for tiling in choosable(arch, forward=False, gated=TABLE[name].gated):
        found = linear_dact_on(arch, tiling, name, p, dtype, outputs=bias)
        check(found, SHARED[arch])
        assert MATRIX_INSTRUCTION[arch] in found.ptx


@on_those_that_fuse
@pytest.mark.parametrize("name", ["gelu", "swiglu"])
def test_linear_act_without_preactivations(arch: int, name: str) -> None:
    for tiling in choosable(arch, forward=True, gated=TABLE[name].gated):
        check(linear_act_on(arch, tiling, name, 0.0, BF16, bias=True, outputs=False), SHARED[arch])


def shared_by_two(found: Compiled, tiling: Tiling) -> bool:
    """True if two programs fit one SM of compute capability 9.0."""
    return 2 * 32 * tiling.warps * found.registers <= 65536 and 2 * found.shared <= SHARED[90]


@pytest.mark.parametrize("name", ["gelu", "mish", "geglu", "swiglu"])
def test_two_programs_of_the_first_candidate_fit_one_sm(name: str) -> None:
    gated = TABLE[name].gated
    tiling = CANDIDATES[False, gated][0]
    assert shared_by_two(linear_dact_on(90, tiling, name, 0.0, BF16, outputs=True), tiling)
    if not gated:
        tiling = CANDIDATES[True, gated][0]
        assert shared_by_two(linear_act_on(90, tiling, name, 0.1, BF16, bias=True, outputs=True), tiling)
