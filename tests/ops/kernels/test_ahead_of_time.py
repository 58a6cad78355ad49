"""Every kernel compiles for GPUs that need not be there, without spilling a register.

The fused products do so at the tilings that dispatch takes off the table. Each architecture is tried with the
formulas that take most and least registers; all others lie between.
"""

import os
from dataclasses import astuple

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("a process that interprets kernels compiles none", allow_module_level=True)

from ffn.activations import TABLE
from ffn.ops.kernels import act, dact, decode, linear_act, linear_dact
from ffn.ops.kernels.tilings import DEFAULTS
from tests.ops.kernels.ahead_of_time import SHARED, Compiled, compiled, tensor

N, D, H = 8192, 1024, 4096
MATRIX_INSTRUCTION = {90: "wgmma.mma_async", 100: "tcgen05.mma"}
CASES = [("gelu", 0.1), ("mish", 0.1), ("relu", 0.0), ("geglu", 0.1), ("swiglu", 0.0)]

on_each = pytest.mark.parametrize("arch", SHARED)
on_those_that_fuse = pytest.mark.parametrize("arch", [10 * major for major in DEFAULTS])
each_case = pytest.mark.parametrize(("name", "p"), CASES)


def check(found: Compiled, arch: int) -> None:
    assert (found.spills, found.stack) == (0, 0)
    assert found.shared <= SHARED[arch]


def optional(present: bool, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor | None:
    return tensor(*shape, dtype=dtype) if present else None


def seed(p: float) -> torch.Tensor | None:
    return optional(p > 0, 1, dtype=torch.int64)


@on_each
@each_case
def test_act(arch: int, name: str, p: float) -> None:
    gated = TABLE[name].gated
    check(compiled(
        arch, act.act, tensor(N, H), optional(gated, N, H), tensor(H), optional(gated, H),
        seed(p), name, p, 0, 0,
    ), arch)  # fmt: skip


@on_each
@each_case
def test_dact(arch: int, name: str, p: float) -> None:
    gated = TABLE[name].gated
    check(compiled(
        arch, dact.dact_, tensor(N, H), tensor(N, H), optional(gated, N, H), tensor(H), optional(gated, H),
        seed(p), name, p, 0, 0, True, True,
    ), arch)  # fmt: skip


@on_each
@pytest.mark.parametrize("tokens", [1, 16, 32])
@pytest.mark.parametrize("name", ["gelu", "geglu"])
def test_decode(arch: int, name: str, tokens: int) -> None:
    gated = TABLE[name].gated
    check(compiled(
        arch, decode.decode, tensor(tokens, D), tensor(H, D), optional(gated, H, D), tensor(H),
        optional(gated, H), name,
    ), arch)  # fmt: skip


@on_those_that_fuse
@each_case
def test_linear_act(arch: int, name: str, p: float) -> None:
    gated = TABLE[name].gated
    found = compiled(
        arch, linear_act.linear_act, tensor(N, D), tensor(H, D), optional(gated, H, D), tensor(H),
        optional(gated, H), seed(p), name, p, 0, 0, True, list(astuple(DEFAULTS[arch // 10][True, gated])),
    )  # fmt: skip
    check(found, arch)
    assert MATRIX_INSTRUCTION[arch] in found.ptx


@on_those_that_fuse
@each_case
def test_linear_dact(arch: int, name: str, p: float) -> None:
    gated = TABLE[name].gated
    found = compiled(
        arch, linear_dact.linear_dact, tensor(N, D), tensor(D, H), tensor(N, H), optional(gated, N, H),
        seed(p), name, p, 0, 0, True, True, list(astuple(DEFAULTS[arch // 10][False, gated])),
    )  # fmt: skip
    check(found, arch)
    assert MATRIX_INSTRUCTION[arch] in found.ptx
