"""The backend in torch ops, piece by piece; and that the oneDNN route changes speed, not numbers."""

import sys

import pytest
import torch

from ffn.activations import TABLE
from ffn.ops import dispatch, eager, feed_forward
from ffn.ops.dispatch import Choice
from ffn.ops.dropout_mask import noise
from tests.ops.samples import F64, NAMES, Arguments, draw, gradients, leaf

needs_onednn = pytest.mark.skipif(
    not dispatch._has_onednn_linear() or torch.cpu._is_amx_tile_supported(),
    reason="torch has no oneDNN here, or its float32 products would round to bfloat16",
)
SEED = torch.tensor([11])
WIDE = {"shape": (128,), "widths": (128, 640, 512), "dtype": torch.float32}  # above eager._WORTH_ONEDNN


def force(monkeypatch: pytest.MonkeyPatch, choice: Choice) -> None:
    """Make this the choice for whatever comes, and forget choices that are remembered."""
    rule = sys.modules["ffn.ops.feed_forward"]
    monkeypatch.setattr(dispatch, "choose", lambda backend, device, dtype: choice)
    monkeypatch.setattr(rule, "_known", rule._checked)


def factors(pre: torch.Tensor, row_start: int) -> torch.Tensor:
    return noise(SEED, *pre.shape, 0.4, F64, row_start)


@pytest.mark.parametrize("backend", dispatch.MODULES.values(), ids=dispatch.MODULES)
@pytest.mark.parametrize("name", NAMES)
def test_activate_and_back(name: str, backend) -> None:
    row = TABLE[name]
    pre, pre_gate = torch.randn(5, 8, dtype=F64), torch.randn(5, 8, dtype=F64) if row.gated else None
    dy, down = torch.randn(5, 3, dtype=F64), torch.randn(3, 8, dtype=F64)
    for seed, row_start in ((None, 0), (SEED, 0), (SEED, 7)):
        n = 1.0 if seed is None else factors(pre, row_start)
        value, slope = row.formula(pre if pre_gate is None else pre_gate)
        h, dh = n * value, n * (dy @ down)
        dpre, dpre_gate = dh * slope, None
        if pre_gate is not None:
            h, dpre, dpre_gate = h * pre, dh * value, dh * pre * slope
        kept = [t.clone() for t in (pre, dy, down)]
        rest = row, seed, 0.4, row_start
        torch.testing.assert_close(backend.activate(pre, pre_gate, *rest), h)
        gated = pre_gate is not None
        sums = dpre.sum(0), dpre_gate.sum(0) if gated else None
        found = backend.linear_dact(dy, down, pre, pre_gate, *rest, True, True, gated, False)
        torch.testing.assert_close(tuple(found), (dpre, dpre_gate, dy.t() @ h, *sums))
        found = backend.linear_dact(dy, down, pre, pre_gate, *rest, False, False, False, False)
        torch.testing.assert_close(tuple(found), (dpre, dpre_gate, None, None, None))
        assert all(torch.equal(a, b) for a, b in zip(kept, (pre, dy, down), strict=True))
        spent = pre.clone(), pre_gate.clone() if gated else None
        found = backend.linear_dact(dy, down, *spent, *rest, True, True, gated, True)
        torch.testing.assert_close(tuple(found), (dpre, dpre_gate, dy.t() @ h, *sums))
        if backend is eager:
            assert found[:2] == spent


@needs_onednn
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_linear_is_the_same_in_onednn(bias: bool, dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and not dispatch.bfloat16_in_onednn():
        pytest.skip("this processor does not multiply bfloat16")
    for rows, multiplied in ((2, 0), (256, 1)):
        x, weight = torch.randn(rows, 96).to(dtype), torch.randn(400, 96).to(dtype)
        offset = torch.randn(400).to(dtype) if bias else None
        assert (rows * weight.numel() >= eager._WORTH_ONEDNN[torch.float32]) == multiplied
        ours, torchs = eager.linear(x, weight, offset, True), eager.linear(x, weight, offset, False)
        exact = torch.nn.functional.linear(
            x.double(), weight.double(), None if offset is None else offset.double()
        )
        error, allowed = ((y.double() - exact).abs().max() for y in (ours, torchs))
        assert error <= 2 * allowed + torch.finfo(dtype).eps * exact.abs().max()


@needs_onednn
@pytest.mark.parametrize("name", ["relu", "mish", "swiglu", "reglu"])
@pytest.mark.parametrize("save", ["preact", "input"])
def test_the_float32_route_changes_nothing_but_rounding(monkeypatch, name: str, save: str) -> None:
    arguments = draw(name, **WIDE)
    dy = torch.randn(128, 512)
    results = []
    for onednn in (True, False):
        choice = Choice("eager", "", onednn, onednn)
        force(monkeypatch, choice)
        torch.manual_seed(0)
        y = feed_forward(*arguments, activation=name, dropout=0.1, save=save)
        results.append([y, *gradients(y, arguments, dy)])
    for ours, theirs in zip(*results, strict=True):
        difference = (ours - theirs).abs().max() / theirs.abs().max()
        assert difference <= 1e-5  # float32 rounding over sums of 640; bfloat16's would be 1e-3


@pytest.mark.skipif(
    not dispatch.float32_faster_in_onednn(), reason="float32 products stay where torch has them"
)
@pytest.mark.parametrize("name", ["gelu", "swiglu"])
@pytest.mark.parametrize("sizes", [(512, 256, 1024), (1100, 768, 1600)], ids=str)
def test_float32_rounds_at_most_twice_as_much_as_plain_torch(name: str, sizes: tuple[int, int, int]) -> None:
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
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = request.param
    yield request.param
    matmul.fp32_precision = before


@pytest.mark.skipif(not hasattr(torch.backends.mkldnn, "matmul"), reason="this torch has no such setting")
def test_the_setting_is_put_back_even_when_backward_raises(monkeypatch, precision: str) -> None:
    matmul = torch.backends.mkldnn.matmul
    choice = Choice("eager", "", onednn=False, float32_in_onednn=True)
    force(monkeypatch, choice)
    monkeypatch.setitem(eager._WORTH_ONEDNN, torch.float32, 0)
    arguments = draw("gelu", dtype=torch.float32)
    inside = []
    real = eager.linear_dact

    def watched(*args):
        inside.append(matmul.fp32_precision)
        return real(*args)

    def raising(*args):
        inside.append(matmul.fp32_precision)
        raise ArithmeticError("within backward")

    monkeypatch.setattr(eager, "linear_dact", watched)
    y = feed_forward(*arguments)
    assert matmul.fp32_precision == precision
    y.sum().backward()
    assert matmul.fp32_precision == precision
    monkeypatch.setattr(eager, "linear_dact", raising)
    with pytest.raises(ArithmeticError, match="within backward"):
        feed_forward(*arguments).sum().backward()
    assert matmul.fp32_precision == precision
    assert inside == ["bf16", "bf16"]
    with pytest.raises(KeyError), eager.float32_in_onednn():
        raise KeyError
    assert matmul.fp32_precision == precision
    if precision == "none":  # else torch refuses the question, having two answers
        assert torch.get_float32_matmul_precision() == "highest"


def test_few_rows_never_touch_the_setting(monkeypatch) -> None:
    force(monkeypatch, Choice("eager", "", onednn=False, float32_in_onednn=True))
    rule = sys.modules["ffn.ops.feed_forward"]
    monkeypatch.setattr(rule, "float32_in_onednn", lambda: pytest.fail("not worth it"))
    feed_forward(*draw("gelu", dtype=torch.float32)).sum().backward()
    monkeypatch.setitem(eager._WORTH_ONEDNN, torch.float32, 0)
    feed_forward(*draw("gelu", shape=(1,), dtype=torch.float32)).sum().backward()


def test_other_dtypes_never_touch_the_setting(monkeypatch) -> None:
    monkeypatch.setattr(eager, "float32_in_onednn", lambda: pytest.fail("for float32 alone"))
    for dtype in (F64, torch.bfloat16):
        feed_forward(*draw("gelu", dtype=dtype)).sum().backward()


@needs_onednn
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_strided_bias_is_read_as_it_lies(dtype: torch.dtype) -> None:
    x, weight = torch.randn(512, 512).to(dtype), torch.randn(512, 512).to(dtype)
    bias = 100.0 * torch.randn(1024).to(dtype)[::2]
    y, plain = (eager.linear(x, weight, b, onednn) for b, onednn in ((bias, True), (bias.clone(), False)))
    torch.testing.assert_close(y, plain, atol=1e-2 * 512**0.5, rtol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_gradient_of_a_weight_lies_as_the_weight_does(dtype):
    dy, x = torch.randn(9, 5, dtype=dtype), torch.randn(9, 3, dtype=dtype)
    kept = torch.randn(3, 5, dtype=dtype)  # (in, out), as GPT-2 keeps it
    for weight in (kept.t(), kept.t().contiguous(), kept.t()[:1]):
        found = eager.weight_gradient(dy[:, : weight.shape[0]], x, weight)
        torch.testing.assert_close(found, dy[:, : weight.shape[0]].t() @ x)
    assert eager.weight_gradient(dy, x, kept.t()).t().is_contiguous()
    assert eager.weight_gradient(dy, x, kept.t().contiguous()).is_contiguous()
