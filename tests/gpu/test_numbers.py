"""The compiled kernels: outputs and gradients in three dtypes, fused and unfused."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ffn.activations import TABLE
from ffn.ops import dispatch, rule
from ffn.ops.between import Between, Needs
from ffn.ops.feed_forward import feed_forward
from ffn.ops.kernels import tilings
from tests.gpu.compare import DTYPES, FUSED, ODD, assert_equal, check, sample
from tests.ops.samples import NAMES, gradients, leaf

F32, BF16, F16 = DTYPES
QUICK = tilings.Tiling(64, 64, 32, 8, 2, 4, 2)  # the default tiles take seconds each to compile
CASES = [(True, 0.1), (False, 0.0), (True, 0.0), (False, 0.1)]  # bias, dropout
KEPT = [{}, {"save": "input"}, {"save": "input", "chunk_tokens": 256}]
both = pytest.mark.parametrize("name", ["gelu", "swiglu"])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.mark.parametrize("name", NAMES)
def test_every_activation(monkeypatch: pytest.MonkeyPatch, device: torch.device, name: str) -> None:
    """Unfused in float32 and one half precision, fused in the other; dtypes, bias and dropout alternate."""
    turn = NAMES.index(name)
    half, other = (BF16, F16) if turn % 2 else (F16, BF16)
    (bias, p), (bias_2, p_2), (bias_3, p_3) = (CASES[(turn // 2 + k) % 4] for k in range(3))
    check(name, sample(name, device, F32, *ODD, bias), p)
    check(name, sample(name, device, half, *ODD, bias_2), p_2)
    asked = []
    monkeypatch.setattr(tilings, "choose", lambda *case: asked.append(case) or QUICK)
    check(name, sample(name, device, other, (150,), (72, 136, 40), bias_3), p_3)
    assert [forward for forward, *_ in asked] == [True, False]


@both
@dtypes
@pytest.mark.parametrize(("bias", "p"), CASES[:2], ids=["bias_and_dropout", "neither"])
def test_chosen_tiles(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, name: str, dtype: torch.dtype, bias: bool, p: float
) -> None:
    found, choose = [], tilings.choose
    monkeypatch.setattr(tilings, "choose", lambda *case: found.append(choose(*case)) or found[-1])
    check(name, sample(name, device, dtype, *FUSED, bias), p)
    assert len(found) == 2
    if dtype != F32 and not all(found):
        pytest.skip("the numbers are right, but this GPU fuses no product")


@pytest.mark.parametrize("options", KEPT, ids=["preact", "input", "chunks"])
def test_model_shapes(device: torch.device, options: dict) -> None:
    check("gelu", sample("gelu", device, BF16, (2, 500), (768, 3072, 768)), 0.1, **options)
    check("swiglu", sample("swiglu", device, BF16, (640,), (896, 4864, 896), False), **options)


@both
@dtypes
def test_inference(device: torch.device, name: str, dtype: torch.dtype) -> None:
    with torch.no_grad():
        for widths, counts in ((FUSED[1], (1, 32, 300)), (ODD[1], (17, 33))):
            for count in counts:
                check(name, sample(name, device, dtype, (count,), widths))


@both
def test_one_token_and_zero(device: torch.device, name: str) -> None:
    check(name, sample(name, device, BF16, (1,)), 0.1)
    arguments = sample(name, device, BF16, (3, 0))
    y = feed_forward(*arguments, activation=name, dropout=0.1, backend="triton")
    assert y.shape == (3, 0, 256)
    assert all((grad == 0).all() for grad in gradients(y, arguments, torch.ones_like(y)))


def spread(t: Tensor) -> Tensor:
    """Return t strided by two, with other values in between."""
    return torch.stack([t, t + 1], -1)[..., 0]


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_strides(device: torch.device, dtype: torch.dtype) -> None:
    def run(changes: dict[str, Tensor], **options) -> None:
        views = {field: leaf(t.detach()) for field, t in changes.items()}
        check("swiglu", arguments._replace(**views), 0.1, **options)

    arguments = sample("swiglu", device, dtype)
    x, up, down, gate, *_ = arguments
    packed = torch.cat([gate, up])
    run({"gate": packed[:1024], "up": packed[1024:], "x": x.t().contiguous().t()})
    run({"x": spread(x), "down": F.pad(down, (3, 5))[:, 3:-5]})
    run({"x": x[:1].expand(300, 256)})
    run({field: spread(getattr(arguments, field)) for field in ("up_bias", "gate_bias", "down_bias")})
    for dy in (torch.ones((), device=device), torch.randn(256, device=device)):
        run({}, dy=dy.to(dtype).expand(300, 256))


@both
def test_fused_products_equal_unfused(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, name: str
) -> None:
    """dy is the identity, so ddown is the h that backward recomputes."""
    row, backend = TABLE[name], dispatch.module("triton")
    arguments = sample(name, device, BF16, (304,), (256, 1024, 304))
    x, (up, down, gate) = arguments.x, arguments.products()
    dy, seed, found = torch.eye(304, dtype=BF16, device=device), torch.tensor([9], device=device), []
    with torch.no_grad():
        for _ in range(2):
            between, needs = Between(row, seed, 0.1), Needs(True, True, row.gated)
            h, *pre = rule.forward_to_hidden(backend, x, up, gate, between, True)
            dpre, dpre_gate, (ddown, _), *sums = rule.back_to_preactivations(
                backend, dy, down, (True, False), (*pre, between), needs, False
            )
            assert_equal([ddown], [h])
            found.append([t for t in (h, *pre, dpre, dpre_gate, ddown, *sums) if t is not None])
            monkeypatch.setattr(tilings, "choose", lambda *case: None)
    fused, apart = found
    assert_equal(fused[: 2 + row.gated], apart[: 2 + row.gated])
    torch.testing.assert_close(fused, apart)


@dtypes
@pytest.mark.parametrize(("name", "p"), [("gelu", 0.0), ("mish", 0.1), ("swiglu", 0.1)])
def test_eager_backend(device: torch.device, name: str, p: float, dtype: torch.dtype) -> None:
    for options in KEPT:
        check(name, sample(name, device, dtype), p, backend="eager", **options)
