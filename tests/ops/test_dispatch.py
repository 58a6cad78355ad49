"""The backend chosen for a device and dtype, and the reason given."""

import pytest
import torch

from ffn.ops import dispatch
from ffn.ops.dispatch import check_backend, choose

CPU = torch.device("cpu")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def test_unknown_backend_raises() -> None:
    for name in dispatch.BACKENDS:
        check_backend(name)
    for ask in (check_backend, lambda name: choose(name, CPU, torch.float32)):
        with pytest.raises(ValueError, match=r"^backend must be .*'cuda'"):
            ask("cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cpu_runs_torch_ops(dtype: torch.dtype) -> None:
    assert choose("auto", CPU, dtype).backend == choose("eager", CPU, dtype).backend == "eager"
    assert choose("reference", CPU, dtype).backend == "reference"


@pytest.mark.parametrize(
    ("installed", "available", "capability", "hip", "device", "reason"),
    [
        (True, True, (9, 0), None, "cuda", None),
        (True, True, (8, 0), None, "cuda", None),
        (False, True, (9, 0), None, "cuda", "triton"),
        (True, False, (9, 0), None, "cuda", "no GPU"),
        (True, True, (7, 5), None, "cuda", r"7\.5"),
        (True, True, (9, 0), "6.0", "cuda", "ROCm"),
        (True, True, (9, 0), None, "mps", "mps"),
    ],
)
def test_kernels_run_where_they_can_and_else_say_why(
    monkeypatch, installed: bool, available: bool, capability, hip, device: str, reason: str | None
) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    real = dispatch.find_spec
    absent = {} if installed else {"triton"}
    monkeypatch.setattr(dispatch, "find_spec", lambda name: None if name in absent else real(name))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("CC", "cc")
    where = torch.device(device)
    auto = choose("auto", where, torch.bfloat16)
    if reason is None:
        assert auto.backend == choose("triton", where, torch.bfloat16).backend == "triton"
        assert choose("auto", where, torch.float64).backend == "eager"
        with pytest.raises(ValueError, match="float64"):
            choose("triton", where, torch.float64)
    else:
        assert auto.backend == "eager"
        with pytest.raises(ValueError, match=f"^backend must be .*{reason}"):
            choose("triton", where, torch.bfloat16)


def test_triton_needs_a_c_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("CC", raising=False)
    where = torch.device("cuda"), torch.bfloat16
    for found in (["gcc"], ["clang"]):
        monkeypatch.setattr(dispatch, "which", lambda name, found=found: name if name in found else None)
        assert dispatch.why_not_triton(*where) is None
    monkeypatch.setattr(dispatch, "which", lambda name: None)
    assert "C compiler" in choose("auto", *where).reason
    monkeypatch.setenv("CC", "/opt/cc")
    assert dispatch.why_not_triton(*where) is None


def test_meta_tensors_are_served_by_torch_ops() -> None:
    assert choose("auto", torch.device("meta"), torch.float32).backend == "eager"


def test_backend_is_compiled_under_torch_compile() -> None:
    seen = []

    @torch.compile(backend="eager", fullgraph=True)
    def compiled(x: torch.Tensor) -> torch.Tensor:
        seen.append(choose("auto", x.device, x.dtype).backend)
        return x + 1

    compiled(torch.ones(3))
    assert seen == ["compiled"]
