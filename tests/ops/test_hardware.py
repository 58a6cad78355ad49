"""Probes of the CPU do not depend on the caller's defaults, modes or traces."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from ffn.ops import hardware

CACHED = [
    hardware._cpu_vendor,
    hardware._has_onednn_linear,
    hardware.float32_faster_in_onednn,
    hardware.bfloat16_in_onednn,
]


@pytest.fixture
def _asked_anew():
    """Clear the cached answers before and after a test that fakes another machine."""
    real = [function.cache_clear for function in CACHED]
    for clear in real:
        clear()
    yield
    for clear in real:
        clear()


@pytest.mark.usefixtures("_asked_anew")
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_probes_ignore_the_callers_defaults(device: str, dtype: torch.dtype) -> None:
    asked = [*CACHED, hardware.int8_in_onednn, hardware.int8_in_fbgemm]
    truth = [function() for function in asked]
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            assert [function.__wrapped__() for function in asked] == truth
    finally:
        torch.set_default_dtype(before)


@pytest.mark.usefixtures("_asked_anew")
def test_float32_stays_in_mkl_with_amx_tiles(monkeypatch) -> None:
    """oneDNN would round float32 to bfloat16 there."""
    monkeypatch.setattr(hardware, "_cpu_vendor", lambda: "AuthenticAMD")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert not hardware.float32_faster_in_onednn()


@pytest.mark.usefixtures("_asked_anew")
def test_missing_private_op_means_false(monkeypatch) -> None:
    class Empty:
        pass

    monkeypatch.setattr(torch.ops, "mkldnn", Empty())
    assert not hardware._has_onednn_linear()
    assert not hardware.float32_faster_in_onednn()
    assert not hardware.bfloat16_in_onednn()


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize(
    "probe", [hardware._has_onednn_linear, hardware.int8_in_onednn, hardware.int8_in_fbgemm]
)
def test_probes_within_a_trace(probe) -> None:
    can, found = probe(), []

    def first_call(x: torch.Tensor) -> torch.Tensor:
        probe.cache_clear()
        found.append(probe())
        return x + 1

    for run in (torch.jit.trace, lambda f, x: make_fx(f)(x)):
        run(first_call, torch.ones(2))
    assert set(found) == {can}
