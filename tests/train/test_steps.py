"""Accumulated batches equal one large batch; evaluation is the mean over every token."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from ffn.gpt.transformer import Transformer, TransformerConfig
from ffn.train.steps import accumulate_gradients, evaluate, evaluating

CONFIG = TransformerConfig(vocab_size=11, dim=8, num_layers=2, num_heads=2, max_seq_len=6)


def test_two_batches_of_four_equal_one_of_eight() -> None:
    model = Transformer(CONFIG).double()
    tokens, targets = torch.randint(11, (8, 6)), torch.randint(11, (8, 6))
    whole = accumulate_gradients(model, [(tokens, targets)])
    expected = [p.grad for p in model.parameters()]
    model.zero_grad()
    parts = accumulate_gradients(model, list(zip(tokens.split(4), targets.split(4), strict=True)))
    assert parts == pytest.approx(whole, abs=1e-14)
    for p, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient, atol=1e-14, rtol=1e-12)


def test_window_equals_a_shorter_max_seq_len() -> None:
    model, short = Transformer(CONFIG), Transformer(dataclasses.replace(CONFIG, max_seq_len=4))
    short.load_state_dict(model.state_dict())
    tokens = torch.randint(11, (40,))
    assert evaluate(model, tokens, window=4) == evaluate(short, tokens) != evaluate(model, tokens)


@pytest.mark.parametrize("batch_size", [0, -3])
def test_batch_size_must_be_positive(batch_size: int) -> None:
    with pytest.raises(ValueError, match=rf"^batch_size .* {batch_size}$"):
        evaluate(Transformer(CONFIG), torch.randint(11, (40,)), batch_size=batch_size)


def test_the_loss_is_read_from_the_device_once(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = [(torch.randint(11, (2, 6)), torch.randint(11, (2, 6)))] * 3
    readings: list[torch.Tensor] = []

    def item(tensor: torch.Tensor, real=torch.Tensor.item) -> object:
        readings.append(tensor)
        return real(tensor)

    monkeypatch.setattr(torch.Tensor, "item", item)
    accumulate_gradients(Transformer(CONFIG), batches)
    assert len(readings) == 1


@pytest.mark.parametrize("n", [3, 7, 13, 40])
def test_evaluation_is_the_mean_over_every_token(n: int) -> None:
    torch.manual_seed(n)
    model = Transformer(CONFIG).double().train()
    tokens = torch.randint(11, (n,), dtype=torch.uint8)
    losses = torch.full((n,), -1.0, dtype=torch.float64)
    window = min(6, n - 1)
    for start in [*range(0, n - window, window), n - 1 - window]:
        piece = tokens[start : start + window + 1].long()
        each = F.cross_entropy(model(piece[None, :-1])[0], piece[1:], reduction="none").detach()
        fresh = losses[start + 1 : start + window + 1] < 0
        losses[start + 1 : start + window + 1][fresh] = each[fresh]
    for batch_size in (1, 3):
        assert evaluate(model, tokens, batch_size=batch_size) == pytest.approx(
            losses[1:].mean().item(), abs=1e-12
        )
    assert model.training, "the model is in training mode again"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own
def test_evaluation_compiles_nothing() -> None:
    model, graphs = Transformer(CONFIG), []
    model.compile(backend=lambda graph, _: graphs.append(graph) or graph.forward)
    tokens = torch.randint(11, (2, 6))
    with evaluating(model):
        model(tokens)
    assert not graphs
    model(tokens)
    assert graphs


def test_evaluation_is_without_dropout_and_random_draws() -> None:
    model = Transformer(TransformerConfig(**{**CONFIG.__dict__, "dropout": 0.5, "ffn_dropout": 0.5})).train()
    tokens = torch.randint(11, (40,), dtype=torch.uint8)
    state = torch.get_rng_state()
    assert evaluate(model, tokens) == evaluate(model, tokens)
    assert torch.equal(torch.get_rng_state(), state)
    assert evaluate(model, tokens, precision="bfloat16") == pytest.approx(evaluate(model, tokens), rel=0.01)
