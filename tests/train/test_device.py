"""Devices and precisions: what was asked for, or one line that says why not."""

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
            r"^device=cuda: this torch .* (is built without CUDA|finds no CUDA device); use device=auto",
        ),
        ("cuda:7", True, r"^device=cuda:7: there are 2 CUDA devices, the last is cuda:1$"),
        ("mps", False, r"^device=mps: Metal is not available here"),
        ("tpu", False, r"^device=tpu: no such device"),
        ("meta", False, r"^device=meta: ffn runs on cpu, cuda and mps$"),
    ],
)
def test_a_device_that_is_not_there_is_refused(monkeypatch, name: str, cuda: bool, message: str) -> None:
    available(monkeypatch, cuda, mps=False)
    with pytest.raises(ValueError, match=message):
        choose_device(name)


def test_a_device_by_name_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    available(monkeypatch, cuda=True, mps=True)
    for name in ("cpu", "cuda", "cuda:1", "mps"):
        assert choose_device(name) == (torch.device(name), "as asked")


@pytest.mark.parametrize("native", [True, False])
def test_auto_is_bfloat16_where_it_is_native(monkeypatch: pytest.MonkeyPatch, native: bool) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    cpu = torch.device("cpu")
    precision, _ = choose_precision("auto", cpu)
    assert precision == ("bfloat16" if native else "float32")
    assert choose_precision("bfloat16", cpu) == ("bfloat16", "as asked")
    linear = torch.nn.Linear(2, 2)
    with autocast(cpu, precision):
        assert linear(torch.zeros(1, 2)).dtype == getattr(torch, precision)


def test_freed_memory_is_kept_where_the_c_library_can_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert keep_freed_memory() in (True, False)
    monkeypatch.setattr("sys.platform", "darwin")
    assert keep_freed_memory() is False
