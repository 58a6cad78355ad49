"""Packed copies: matmuls equal those of the plain weights, and a changed weight is seen."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ffn.activations import TABLE
from ffn.ops import hardware
from ffn.packing.float_copies import Packed
from tests.ops.samples import NAMES, by_reference, draw

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def skip_unless_packed(dtype: torch.dtype) -> None:
    if not hardware.packs(dtype):
        pytest.skip(f"oneDNN packs no {dtype} on this processor")


@DTYPES
@pytest.mark.parametrize("rows", [(1,), (3,), (2, 5), (), (0,), (2, 0)])
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_equals_linear(dtype: torch.dtype, rows: tuple[int, ...], bias: bool) -> None:
    skip_unless_packed(dtype)
    weight = torch.randn(640, 512).to(dtype)
    b = torch.randn(640).to(dtype) if bias else None
    x = torch.randn(*rows, 512).to(dtype)
    packed = Packed((weight, b))
    assert packed.fit(x)
    y = packed.linear(x)
    assert y.dtype == dtype
    assert y.shape == (*rows, 640)
    exact = F.linear(x.double(), weight.double(), None if b is None else b.double())
    terms = x.double().abs() @ weight.double().abs().t()  # the sums' rounding errors grow with these
    bound = 512**0.5 * torch.finfo(torch.float32).eps * terms + torch.finfo(dtype).eps * exact.abs()
    assert ((y.double() - exact).abs() <= bound).all()


@DTYPES
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(5,), (2, 3), (), (0,)])
@torch.no_grad()
def test_equals_the_reference(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    skip_unless_packed(dtype)
    x, *weights = draw(name, shape=shape, widths=(48, 64, 40), dtype=dtype)
    y = Packed(tuple(weights)).feed_forward(x, name)
    plain = by_reference(x, *weights, activation=TABLE[name])
    exact = by_reference(*(None if t is None else t.double() for t in (x, *weights)), activation=TABLE[name])
    assert (y.shape, y.dtype) == (plain.shape, dtype)
    if y.numel():
        error, theirs = ((t.double() - exact).abs().max() for t in (y, plain))
        ulps = 8 if dtype == torch.float32 else 1  # longer chains in float32
        assert error <= 2 * theirs + ulps * torch.finfo(dtype).eps * exact.abs().max()


@DTYPES
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_nan_stays_in_its_token(name: str, dtype: torch.dtype) -> None:
    skip_unless_packed(dtype)
    x, *weights = draw(name, widths=(48, 64, 40), dtype=dtype)
    x[2, 5] = torch.nan
    y = Packed(tuple(weights)).feed_forward(x, name)
    assert y[2].isnan().all()
    assert not y[[0, 1, 3]].isnan().any()


def transpose(p: nn.Parameter) -> None:
    p.data = p.data.t()


def cut(p: nn.Parameter) -> None:
    p.data = p.data[:32]


def halve(p: nn.Parameter) -> None:
    p.data = p.data.bfloat16()


def multiply(p: nn.Parameter) -> None:
    with torch.no_grad():
        p.mul_(2.0)


def multiply_in_inference(p: nn.Parameter) -> None:
    with torch.inference_mode():
        p.mul_(2.0)


def write_one_element(p: nn.Parameter) -> None:
    p.detach()[10, 20] += 1.0


@pytest.mark.parametrize(
    "change",
    [transpose, cut, halve, multiply, multiply_in_inference, write_one_element],
    ids=lambda change: change.__name__,
)
def test_a_changed_weight_is_seen(change) -> None:
    skip_unless_packed(torch.float32)
    weight, bias = nn.Parameter(torch.randn(64, 64)), nn.Parameter(torch.randn(64))
    packed = Packed((weight, bias))
    assert packed.are_of((weight, bias))
    assert not packed.are_of((nn.Parameter(weight.detach()), bias))
    assert not packed.are_of((weight, None))
    change(weight)
    assert not packed.are_of((weight, bias))


BIAS_CHANGES = {
    "expanded": lambda p: setattr(p, "data", p.data[:1].expand(64)),
    "strided": lambda p: setattr(p, "data", p.data.repeat(2)[::2]),
    "cut": lambda p: setattr(p, "data", p.data[:5]),
    "in place": lambda p: p.as_strided_((64,), (0,)),
    "in another shape": lambda p: p.unsqueeze_(0),
    "another dtype": lambda p: setattr(p, "data", p.data.bfloat16()),
}


@pytest.mark.parametrize("change", BIAS_CHANGES)
def test_a_changed_bias_at_the_same_address_is_seen(change: str) -> None:
    skip_unless_packed(torch.float32)
    linear = nn.Linear(64, 64)
    packed = Packed((linear.weight, linear.bias))
    with torch.no_grad():
        BIAS_CHANGES[change](linear.bias)
    assert not packed.are_of((linear.weight, linear.bias))


def test_the_address_of_a_copied_weight_is_not_reused() -> None:
    skip_unless_packed(torch.float32)
    weight = nn.Parameter(torch.zeros(1024, 1024))
    packed, address = Packed((weight, None)), weight.data_ptr()
    for _ in range(5):
        weight.data = torch.zeros(1024, 1024)
        assert weight.data_ptr() != address
        assert not packed.are_of((weight, None))


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (torch.zeros(64, 64, dtype=torch.float16), "torch.float16 on cpu"),
        (torch.zeros(64, 64, dtype=torch.float64), "torch.float64 on cpu"),
        (torch.zeros(64, 64, device="meta"), "torch.float32 on meta"),
        (torch.zeros(32, 64).t(), "strided"),
    ],
)
def test_unsupported_weights_are_refused(weight: Tensor, reason: str) -> None:
    skip_unless_packed(torch.float32)
    assert str(Packed.why_not(weight)).startswith(reason)
    assert Packed.why_not(torch.zeros(64, 64)) is None


def test_inference_tensors_are_refused() -> None:
    skip_unless_packed(torch.float32)
    with torch.inference_mode():
        weight = torch.zeros(64, 64)
    assert "inference" in str(Packed.why_not(weight))


def test_without_onednn_every_weight_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "packs", lambda dtype: False)
    assert "oneDNN" in str(Packed.why_not(torch.zeros(64, 64)))
