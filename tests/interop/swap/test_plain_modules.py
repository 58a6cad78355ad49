"""What the op reads off other libraries' modules: split weights, rows, and the guard before both."""

import importlib

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ffn.activations import TABLE
from ffn.interop.swap import plain_modules as weights
from ffn.interop.swap.plain_modules import (
    drop,
    fused,
    is_plain,
    plain_projection,
    probability,
    row_name,
    split_packed,
)
from tests.interop.swap.same import F64
from tests.kept import kept_for_backward

packings = pytest.mark.parametrize("packing", weights.PACKINGS)


def by_hand(packed: Tensor, packing: str) -> tuple[Tensor, Tensor]:
    half = packed.shape[0] // 2
    match packing:
        case "gate_first":
            return packed[:half], packed[half:]
        case "gate_last":
            return packed[half:], packed[:half]
    return packed[0::2], packed[1::2]


@packings
def test_packed_weights_are_split_into_views(packing: str) -> None:
    storage = torch.randn(8, 12, dtype=F64)
    for packed in (storage[:, :3], storage[0, :6], storage.t()[:6], storage[:0]):  # strided ones, and none
        parts = split_packed(packed, packing)
        assert [torch.equal(a, b) for a, b in zip(parts, by_hand(packed, packing), strict=True)] == [True] * 2
        assert all(t.untyped_storage().data_ptr() == storage.untyped_storage().data_ptr() for t in parts)


@packings
def test_the_gradient_of_a_split_comes_back_in_place(packing: str) -> None:
    packed = torch.randn(6, 4, dtype=F64, requires_grad=True)
    factors = torch.randn(2, 3, 4, dtype=F64)
    ours, theirs = (
        torch.autograd.grad((torch.stack(split(packed, packing)) * factors).sum(), packed)
        for split in (split_packed, by_hand)
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_what_cannot_be_split_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^packing='first': want one of gate_first, gate_last, interleaved$"
    ):
        split_packed(torch.ones(4), "first")
    with pytest.raises(ValueError, match=r"^a packed gate and up want an even .* rows; got \(5, 2\)$"):
        split_packed(torch.ones(5, 2), "gate_first")


@pytest.mark.parametrize("name", weights._ROWS)
def test_foreign_activations_are_the_rows_they_are_taken_for(name: str) -> None:
    home, _, kind = name.rpartition(".")
    pytest.importorskip(home.split(".")[0])
    act = getattr(importlib.import_module(home), kind)()
    assert row_name(act) == weights._ROWS[name]
    row = TABLE[weights._ROWS[name]]
    x = torch.linspace(-20.0, 20.0, 801, dtype=F64).requires_grad_()
    y = act(x * 1.0)  # some write over what they are given
    torch.testing.assert_close(y, row(x), rtol=2e-11, atol=1e-12)  # FastGELU knows its constant to 11 digits
    grads = [torch.autograd.grad(z, x, torch.ones_like(x), retain_graph=True)[0] for z in (y, row(x))]
    torch.testing.assert_close(*grads, rtol=2e-11, atol=1e-10)


KNOWN = [
    (nn.GELU(), "gelu"),
    (nn.GELU("tanh"), "gelu_tanh"),
    (nn.ReLU(inplace=True), "relu"),
    (nn.SiLU(), "silu"),
    (nn.Identity(), "identity"),
    (nn.LeakyReLU(), "leaky_relu"),
    (F.gelu, "gelu"),
]
OTHERS = [nn.LeakyReLU(0.2), nn.Softplus(beta=2), nn.PReLU(), nn.ReLU6(), torch.sin, lambda x: x, None]


def test_rows_of_torchs_own_activations() -> None:
    assert [row_name(act) for act, _ in KNOWN] == [name for _, name in KNOWN]
    assert [row_name(act) for act in OTHERS] == [None] * len(OTHERS)


def test_a_subclass_or_namesake_has_no_row() -> None:
    class GELU(nn.GELU):
        def forward(self, input: Tensor) -> Tensor:
            return -super().forward(input)

    assert row_name(GELU()) is None
    assert probability(type("Loud", (nn.Dropout,), {})()) is None


def instance_forward(module: nn.Module) -> None:
    original = module.forward
    module.forward = lambda *a: original(*a)


CHANGES = [
    instance_forward,
    lambda module: module.register_forward_hook(lambda *_: None),
    lambda module: module.register_forward_pre_hook(lambda *_: None),
    lambda module: module.register_full_backward_hook(lambda *_: None),
    lambda module: module.register_full_backward_pre_hook(lambda *_: None),
]


@pytest.mark.parametrize("change", CHANGES)
def test_hooked_or_patched_modules_are_not_plain(change) -> None:
    for module, read in (
        (nn.SiLU(), row_name),
        (nn.Dropout(0.5), probability),
        (nn.Linear(2, 2), plain_projection),
    ):
        assert is_plain(module)
        assert read(module) is not None
        change(module)
        assert not is_plain(module)
        assert read(module) is None


def test_a_patched_class_is_not_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    act, dropout = nn.SiLU(), nn.Dropout(0.5)
    for kind in (nn.SiLU, nn.Dropout):
        monkeypatch.setattr(kind, "forward", lambda self, x: -x)
    assert row_name(act) is None
    assert probability(dropout) is None


def test_probabilities() -> None:
    dropout = nn.Dropout(0.25)
    assert probability(dropout) == 0.25
    assert probability(dropout.eval()) == probability(nn.Identity()) == 0.0
    assert probability(nn.Dropout(1.0)) is None
    assert probability(nn.Dropout(1.0).eval()) == 0.0
    assert probability(nn.Dropout1d(0.5)) is None
    assert probability(nn.LayerNorm(3)) is None


def test_drop_keeps_a_seed_and_calls_what_it_does_not_know() -> None:
    x = torch.ones(64, 64, requires_grad=True)
    assert kept_for_backward(lambda: drop(x, nn.Dropout(0.5)), [x]) == {torch.int64: 1}
    y = drop(x, nn.Dropout(0.5))
    assert set(y.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], y)
    assert drop(x, nn.Dropout(1.0)).eq(0.0).all()
    assert drop(x, nn.Tanh()).eq(x.tanh()).all()
    assert drop(x, nn.Dropout(0.5).eval()) is x


def chain(x: Tensor, act, up, down, gate=None, packing=None) -> Tensor:
    if packing is None:
        return down(act(up(x)) if gate is None else act(gate(x)) * up(x))
    a, b = by_hand(up(x).transpose(0, -1), packing)
    return down((act(a) * b).transpose(0, -1))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("how", ["plain", "split", *weights.PACKINGS])
def test_fused_is_the_chain_of_its_modules(how: str, bias: bool) -> None:
    packing = how if how in weights.PACKINGS else None
    up = nn.Linear(4, 6 if packing is None else 12, bias, dtype=F64)
    gate = nn.Linear(4, 6, bias, dtype=F64) if how == "split" else None
    down, x = nn.Linear(6, 5, bias, dtype=F64), torch.randn(2, 3, 4, dtype=F64, requires_grad=True)
    y, expected = (
        fused(x, nn.SiLU(), up, down, gate, packing=packing),
        chain(x, F.silu, up, down, gate, packing),
    )
    assert y is not None
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    parts = [x, *up.parameters(), *down.parameters(), *(gate.parameters() if gate else ())]
    grads = [torch.autograd.grad(z.square().sum(), parts) for z in (y, expected)]
    torch.testing.assert_close(*grads, rtol=1e-11, atol=1e-12)


def test_fused_leaves_alone_what_is_not_plain() -> None:
    x, up, down, silu = torch.randn(3, 4), nn.Linear(4, 6), nn.Linear(6, 4), nn.SiLU()
    half, two = nn.Dropout(0.5), nn.Dropout(0.2)
    assert fused(x, silu, up, down, between=(half, nn.Identity(), two.eval())) is not None
    assert fused(x, silu, up, down, between=(half, two.train())) is None
    assert fused(x, silu, up, down, between=(nn.LayerNorm(6),)) is None
    assert fused(x, nn.ReLU6(), up, down) is None
    assert fused(x, nn.Tanh(), up, nn.Linear(3, 4), packing="gate_first") is None  # gated by tanh: no row
    assert fused(x, silu, nn.Sequential(up), down) is None
    assert fused(x, silu, up, down, nn.Bilinear(4, 4, 6)) is None

    class Tagged(Tensor):
        pass

    assert fused(x.as_subclass(Tagged), silu, up, down) is None
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert fused(x, silu, up, down) is None
    handle.remove()
    with pytest.raises(ValueError, match=r"wants x \(\.\.\., 4\)"):
        fused(torch.randn(3, 5), silu, up, down)


def test_a_conv1d_is_read_as_a_view() -> None:
    conv = pytest.importorskip("transformers.pytorch_utils").Conv1D(6, 4)
    weight, bias = plain_projection(conv)
    assert weight.shape == (6, 4)
    assert weight.untyped_storage().data_ptr() == conv.weight.untyped_storage().data_ptr()
    assert bias is conv.bias
    x = torch.randn(3, 4)
    torch.testing.assert_close(F.linear(x, weight, bias), conv(x))
    assert plain_projection(nn.Conv1d(4, 6, 1)) is None
    assert plain_projection(None) is None
    conv.register_forward_hook(lambda *_: None)
    assert plain_projection(conv) is None
