"""Matmuls of a Linear: oneDNN is as exact as torch, and torch's precision setting is restored."""

import os
import threading

import pytest
import torch
from torch.nn import functional as F

from ffn.ops import eager, hardware, matmul, rule
from ffn.ops.feed_forward import feed_forward
from tests.ops.samples import F64, Arguments, draw, gradients, leaf

needs_onednn = pytest.mark.skipif(
    not hardware._has_onednn_linear() or torch.cpu._is_amx_tile_supported(),
    reason="torch has no oneDNN here, or its float32 products would round to bfloat16",
)
WIDE = {"shape": (128,), "widths": (128, 640, 512), "dtype": torch.float32}  # above matmul._WORTH_ONEDNN


def force(monkeypatch: pytest.MonkeyPatch, onednn: bool) -> None:
    """Run matmuls in oneDNN, or in torch, on any processor."""
    monkeypatch.setattr(matmul, "in_onednn", lambda x: onednn)


@needs_onednn
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linear_in_onednn_is_as_exact_as_torch(monkeypatch, bias: bool, dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and not hardware.bfloat16_in_onednn():
        pytest.skip("this processor has no bfloat16 matmuls")
    for rows, multiplied in ((2, 0), (256, 1)):
        x, weight = torch.randn(rows, 96).to(dtype), torch.randn(400, 96).to(dtype)
        offset = torch.randn(400).to(dtype) if bias else None
        assert (rows * weight.numel() >= matmul._WORTH_ONEDNN[torch.float32]) == multiplied
        exact = F.linear(x.double(), weight.double(), None if offset is None else offset.double())
        force(monkeypatch, True)
        ours, theirs = matmul.linear(x, weight, offset), F.linear(x, weight, offset)
        error, allowed = ((y.double() - exact).abs().max() for y in (ours, theirs))
        assert error <= 2 * allowed + torch.finfo(dtype).eps * exact.abs().max()


@needs_onednn
@pytest.mark.parametrize("name", ["relu", "mish", "swiglu", "reglu"])
@pytest.mark.parametrize("save", ["preact", "input"])
def test_onednn_changes_float32_only_by_rounding(monkeypatch, name: str, save: str) -> None:
    arguments = draw(name, **WIDE)
    dy = torch.randn(128, 512)
    results = []
    for onednn in (True, False):
        force(monkeypatch, onednn)
        torch.manual_seed(0)
        y = feed_forward(*arguments, activation=name, dropout=0.1, save=save)
        results.append([y, *gradients(y, arguments, dy)])
    for ours, theirs in zip(*results, strict=True):
        difference = (ours - theirs).abs().max() / theirs.abs().max()
        assert difference <= 1e-5  # float32 rounding over sums of 640; bfloat16's would be 1e-3


@pytest.mark.skipif(not hardware.float32_faster_in_onednn(), reason="float32 matmuls stay in MKL here")
@pytest.mark.parametrize("name", ["gelu", "swiglu"])
@pytest.mark.parametrize("sizes", [(512, 256, 1024), (1100, 768, 1600)], ids=str)
def test_float32_error_is_at_most_twice_plain_torchs(name: str, sizes: tuple[int, int, int]) -> None:
    tokens, dim, hidden_dim = sizes
    for seed in range(3):
        torch.manual_seed(seed)
        arguments = draw(name, shape=(tokens,), widths=(dim, hidden_dim, dim), dtype=torch.float32)
        dy = torch.randn(tokens, dim)
        results = []
        for dtype, backend in ((F64, "reference"), (torch.float32, "reference"), (torch.float32, "eager")):
            given = Arguments(*(None if t is None else leaf(t.detach().to(dtype)) for t in arguments))
            y = feed_forward(*given, activation=name, backend=backend)
            results.append([y.detach(), *gradients(y, given, dy.to(dtype))])
        for exact, plain, ours in zip(*results, strict=True):
            error, allowed = ((t.double() - exact).abs().max() for t in (ours, plain))
            assert error <= 2 * allowed + torch.finfo(torch.float32).eps * exact.abs().max()


@pytest.fixture(params=["none", "ieee", "tf32"])
def precision(request):
    setting = torch.backends.mkldnn.matmul
    before = setting.fp32_precision
    setting.fp32_precision = request.param
    yield request.param
    setting.fp32_precision = before


@pytest.mark.skipif(not hasattr(torch.backends.mkldnn, "matmul"), reason="this torch has no such setting")
def test_precision_setting_is_restored_if_backward_raises(monkeypatch, precision: str) -> None:
    setting = torch.backends.mkldnn.matmul
    force(monkeypatch, True)
    monkeypatch.setitem(matmul._WORTH_ONEDNN, torch.float32, 0)
    arguments = draw("gelu", dtype=torch.float32)
    inside = []
    real = eager.linear_dact

    def watched(*args):
        inside.append(setting.fp32_precision)
        return real(*args)

    def raising(*args):
        inside.append(setting.fp32_precision)
        raise ArithmeticError("within backward")

    monkeypatch.setattr(eager, "linear_dact", watched)
    y = feed_forward(*arguments)
    assert setting.fp32_precision == precision
    y.sum().backward()
    assert setting.fp32_precision == precision
    monkeypatch.setattr(eager, "linear_dact", raising)
    with pytest.raises(ArithmeticError, match="within backward"):
        feed_forward(*arguments).sum().backward()
    assert setting.fp32_precision == precision
    assert inside == ["bf16", "bf16"]
    with pytest.raises(KeyError), matmul.float32_in_onednn():
        raise KeyError
    assert setting.fp32_precision == precision
    if precision == "none":  # torch raises for the other settings
        assert torch.get_float32_matmul_precision() == "highest"


@pytest.fixture
def untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if a matmul changes the process's precision setting."""
    monkeypatch.setattr(hardware, "float32_faster_in_onednn", lambda: True)
    for module in (matmul, rule):
        monkeypatch.setattr(module, "float32_in_onednn", lambda: pytest.fail("the setting was touched"))


@needs_onednn
@pytest.mark.usefixtures("untouched")
def test_few_rows_do_not_change_the_precision_setting(monkeypatch) -> None:
    feed_forward(*draw("gelu", dtype=torch.float32)).sum().backward()
    monkeypatch.setitem(matmul._WORTH_ONEDNN, torch.float32, 0)
    feed_forward(*draw("gelu", shape=(1,), dtype=torch.float32)).sum().backward()
    with pytest.raises(pytest.fail.Exception):  # many rows change it
        feed_forward(*draw("gelu", dtype=torch.float32)).sum().backward()


@needs_onednn
@pytest.mark.usefixtures("untouched")
def test_other_dtypes_do_not_change_the_precision_setting(monkeypatch) -> None:
    monkeypatch.setitem(matmul._WORTH_ONEDNN, torch.float32, 0)
    for dtype in (F64, torch.bfloat16):
        feed_forward(*draw("gelu", dtype=dtype)).sum().backward()


@needs_onednn
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strided_bias(monkeypatch, dtype: torch.dtype) -> None:
    force(monkeypatch, True)
    x, weight = torch.randn(512, 512).to(dtype), torch.randn(512, 512).to(dtype)
    bias = 100.0 * torch.randn(1024).to(dtype)[::2]
    y, plain = matmul.linear(x, weight, bias), F.linear(x, weight, bias.clone())
    torch.testing.assert_close(y, plain, atol=1e-2 * 512**0.5, rtol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_weight_gradient_has_its_weights_layout(dtype):
    dy, x = torch.randn(9, 5, dtype=dtype), torch.randn(9, 3, dtype=dtype)
    kept = torch.randn(3, 5, dtype=dtype)  # (in, out), as in GPT-2
    for weight in (kept.t(), kept.t().contiguous(), kept.t()[:1]):
        found = matmul.weight_gradient(dy[:, : weight.shape[0]], x, weight)
        torch.testing.assert_close(found, dy[:, : weight.shape[0]].t() @ x)
    assert matmul.weight_gradient(dy, x, kept.t()).t().is_contiguous()
    assert matmul.weight_gradient(dy, x, kept.t().contiguous()).is_contiguous()


@pytest.mark.skipif(not hardware.float32_faster_in_onednn(), reason="float32 matmuls stay in MKL here")
def test_threads_restore_the_precision_setting() -> None:
    before = torch.backends.mkldnn.matmul.fp32_precision
    both_within, may_leave = threading.Barrier(2), threading.Event()

    def first() -> None:
        with matmul.float32_in_onednn():
            both_within.wait()
            may_leave.wait()

    thread = threading.Thread(target=first)
    thread.start()
    with matmul.float32_in_onednn():
        both_within.wait()
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    assert torch.backends.mkldnn.matmul.fp32_precision == "bf16", "the first thread is still inside"
    may_leave.set()
    thread.join()
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@pytest.mark.skipif(not hardware.float32_faster_in_onednn(), reason="float32 matmuls stay in MKL here")
def test_a_forked_child_inherits_neither_the_setting_nor_the_lock() -> None:
    setting = torch.backends.mkldnn.matmul
    before = setting.fp32_precision
    with matmul.float32_in_onednn(), matmul._lock:  # as another thread may hold both
        pid = os.fork()
        if pid == 0:
            fine = setting.fp32_precision == before and not matmul._lock.locked() and matmul._within == 0
            os._exit(0 if fine else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert setting.fp32_precision == before
