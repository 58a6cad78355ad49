"""Choice of device and precision: available ones are taken, others refused."""

import pytest
import torch

from ffn.train.device import autocast, choose_device, choose_precision, keep_freed_memory


def available(monkeypatch: pytest.MonkeyPatch, cuda: bool, mps: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2 if cuda else 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


@pytest.mark.parametrize(
    ("cuda", "mps", "device", "why"),
    [
        (True, True, "cuda", "CUDA is available: a GPU"),
        (False, True, "mps", "no CUDA, and Metal is available"),
        (False, False, "cpu", "neither CUDA nor Metal is available"),
    ],
)
def test_auto_takes_cuda_then_mps_then_cpu(monkeypatch, cuda: bool, mps: bool, device: str, why: str) -> None:
    available(monkeypatch, cuda, mps)
    chosen, said = choose_device("auto")
    assert chosen.type == device
    assert said.startswith(why)


@pytest.mark.parametrize(
    ("name", "cuda", "message"),
    [
        (
            "cuda",
            False,
            r"^device=cuda: .*device=auto",
        ),
        ("cuda:7", True, r"^device must be at most cuda:1, .* got cuda:7$"),
        ("mps", False, r"^device=mps: "),
        ("tpu", False, r"^device must be .* got tpu$"),
        ("meta", False, r"^device must be .* got meta$"),
    ],
)
def test_an_unavailable_device_is_refused(monkeypatch, name: str, cuda: bool, message: str) -> None:
    available(monkeypatch, cuda, mps=False)
    with pytest.raises(ValueError, match=message):
        choose_device(name)


def test_an_available_device_is_taken_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    available(monkeypatch, cuda=True, mps=True)
    for name in ("cpu", "cuda", "cuda:1", "mps"):
        assert choose_device(name) == (torch.device(name), "as asked")


@pytest.mark.parametrize("native", [True, False])
def test_auto_precision_is_bfloat16_where_native(monkeypatch: pytest.MonkeyPatch, native: bool) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    cpu = torch.device("cpu")
    precision, _ = choose_precision("auto", cpu)
    assert precision == ("bfloat16" if native else "float32")
    assert choose_precision("bfloat16", cpu) == ("bfloat16", "as asked")
    linear = torch.nn.Linear(2, 2)
    with autocast(cpu, precision):
        assert linear(torch.zeros(1, 2)).dtype == getattr(torch, precision)


def test_keep_freed_memory_returns_false_off_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    assert keep_freed_memory() in (True, False)
    monkeypatch.setattr("sys.platform", "darwin")
    assert keep_freed_memory() is False
