"""The plain GPT and its training recipe."""

import pytest
import torch
from torch import nn

from benchmarks import shakespeare
from benchmarks.baseline import GPT


def test_baseline_has_the_recipes_parameters_and_is_causal() -> None:
    model = GPT(65, 128, 4, 4, 64, bias=False).eval()
    assert sum(p.numel() for p in model.parameters()) == 4 * (12 * 128**2 + 2 * 128) + (65 + 64 + 1) * 128
    tokens = torch.randint(65, (2, 9))
    changed = tokens.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % 65
    torch.testing.assert_close(model(tokens)[:, :5], model(changed)[:, :5])
    loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), changed.flatten())
    torch.testing.assert_close(model(tokens, changed), loss)
    assert model.generate(tokens, 3).shape == (2, 12)


def test_validation_loss_reads_every_full_window_once() -> None:
    tokens = torch.randint(7, (3 * 4 + 3,))
    seen: list[torch.Tensor] = []

    def uniform(x: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return torch.zeros(*x.shape, 7)

    loss = shakespeare.validation_loss(uniform, tokens, window=4)
    assert loss == pytest.approx(torch.tensor(7.0).log().item())
    assert torch.equal(torch.cat(seen).flatten(), tokens[:12])


def test_recipe_warms_up_decays_and_learns() -> None:
    rates = [shakespeare.learning_rate(step, 2000) for step in range(2001)]
    assert max(rates) == rates[100] == shakespeare.PEAK
    assert rates[2000] == pytest.approx(shakespeare.FLOOR)
    row = shakespeare.run_baseline("abcd" * 400, steps=20, seed=0)
    assert row["val_loss"] < 1.3  # untrained: the logarithm of 4, 1.39
