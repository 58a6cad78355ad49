"""Choice of the backend for a device and dtype."""

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


def test_triton_raises_where_auto_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for device in (CPU, torch.device("mps"), torch.device("meta")):
        assert choose("auto", device, torch.float32).backend == "eager"
        with pytest.raises(ValueError, match=r"^backend must be"):
            choose("triton", device, torch.float32)


def test_backend_is_compiled_under_torch_compile() -> None:
    seen = []

    @torch.compile(backend="eager", fullgraph=True)
    def compiled(x: torch.Tensor) -> torch.Tensor:
        seen.append(choose("auto", x.device, x.dtype).backend)
        return x + 1

    compiled(torch.ones(3))
    assert seen == ["compiled"]
