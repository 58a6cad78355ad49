"""reroute: dropout in a swapped block follows its original, and repeats in checkpointing."""

import pytest
import torch
from torch import nn

from tests.interop.swap.blocks import KINDS, kinds, pair, rows, runs_old, swapped
from tests.interop.swap.same import F64, assert_same, outcome


@kinds
def test_dropout_follows_its_rate_and_mode(kind: str) -> None:
    old, new = pair(kind, 0.5)
    x = rows()
    assert_same(outcome(new.eval(), x), outcome(old.eval(), x))
    new.train()
    first, again, other = outcome(new, x, 1), outcome(new, x, 1), outcome(new, x, 2)
    assert_same(again, first)
    assert not torch.equal(first["y"], other["y"])
    holder, name = (
        (new, "p") if kind == "plain" else (new.get_submodule("drop" if kind == "gated" else "2"), "p")
    )
    setattr(holder, name, 0.0)
    assert_same(outcome(new, x), outcome(old.eval(), x))
    assert not runs_old(new)
    setattr(holder, name, 1.0)
    assert torch.equal(new(x), new(x)), "at rate 1 the output is constant"
    assert runs_old(new)
    if kind != "plain":
        setattr(holder, name, 0.5)
        holder.eval()
        assert_same(outcome(new, x), outcome(old.eval(), x))


@kinds
def test_dropout_has_the_statistics_of_the_original(kind: str) -> None:
    old, new = pair(kind, 0.3)
    x = rows()[:1, :1].expand(4000, 1, 6).contiguous()
    means, variances = [], []
    with torch.no_grad():
        for model in (old, new):
            y = model(x)[:, 0]
            means.append(y.mean(0))
            variances.append(y.var(0))
    error = 5 * (variances[0] / 4000).sqrt() * 2**0.5
    assert ((means[0] - means[1]).abs() < error).all()
    assert (variances[0] / variances[1] - 1).abs().max() < 0.25


@pytest.mark.parametrize("reentrant", [False, True])
@kinds
def test_checkpointing_repeats_the_same_dropout_mask(kind: str, reentrant: bool) -> None:
    model, x = swapped(KINDS[kind](0.4)), rows()
    expected = outcome(model, x, 5)

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=reentrant)

    found = Checkpointed()
    x = x.requires_grad_()
    torch.manual_seed(5)
    y = found(x)
    (y * torch.linspace(0.5, 1.5, y.numel(), dtype=F64).view_as(y)).sum().backward()
    grads = {"y": y.detach(), "x": x.grad, **{n: p.grad for n, p in model.named_parameters()}}
    assert_same(grads, expected)
