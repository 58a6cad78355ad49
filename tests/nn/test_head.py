"""The head: a matmul with its own matrix or the token table, exactly one of the two."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ffn.nn.head import Head, HeadTransform


def test_logits_and_loss_of_an_untied_head() -> None:
    head = Head(6, 11, dtype=torch.float64)
    hidden, targets = torch.randn(2, 3, 6, dtype=torch.float64), torch.randint(11, (2, 3))
    assert head.weight is not None
    torch.testing.assert_close(head(hidden), hidden @ head.weight.T)
    options = {"ignore_index": int(targets[0, 0]), "label_smoothing": 0.1}
    expected = F.cross_entropy(head(hidden).flatten(0, 1), targets.flatten(), **options)
    torch.testing.assert_close(head.loss(hidden, targets, **options), expected)


def test_tied_head_owns_no_matrix() -> None:
    head, table = Head(6, 11, tied=True), torch.randn(11, 6)
    hidden, targets = torch.randn(2, 3, 6), torch.randint(11, (2, 3))
    assert head.state_dict() == {}
    torch.testing.assert_close(head(hidden, table), hidden @ table.T)
    expected = F.cross_entropy(head(hidden, table).flatten(0, 1), targets.flatten())
    torch.testing.assert_close(head.loss(hidden, targets, table), expected)


def test_exactly_one_matrix_is_required() -> None:
    hidden, table = torch.randn(2, 6), torch.randn(11, 6)
    for head, given in ((Head(6, 11, tied=True), None), (Head(6, 11), table)):
        with pytest.raises(ValueError, match=r"^table"):
            head(hidden, given)


def test_reset_draws_from_the_generator() -> None:
    head = Head(64, 128)
    weights = []
    for seed in (1, 1, 2):
        head.reset_parameters(torch.Generator().manual_seed(seed))
        weights.append(head.weight.detach().clone())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert weights[0].std().item() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("tied", [True, False])
def test_transform_bias_and_softcap_equal_their_formula(tied: bool) -> None:
    transform = HeadTransform(6, "gelu_new", nn.LayerNorm(6, dtype=torch.float64), dtype=torch.float64)
    head = Head(6, 11, tied=tied, bias=True, softcap=2.0, transform=transform, dtype=torch.float64)
    table = torch.randn(11, 6, dtype=torch.float64)
    hidden, targets = torch.randn(2, 3, 6, dtype=torch.float64), torch.randint(11, (2, 3))
    with torch.no_grad():
        head.bias.normal_()
    given = table if tied else None
    x = transform.norm(F.gelu(transform.dense(hidden), approximate="tanh"))
    logits = 2.0 * torch.tanh((x @ (table if tied else head.weight).T + head.bias) / 2.0)
    torch.testing.assert_close(head(hidden, given), logits)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(head.loss(hidden, targets, given), expected)


def test_gated_head_activation_raises() -> None:
    with pytest.raises(ValueError, match=r"^head_activation"):
        HeadTransform(6, "swiglu", nn.Identity())
