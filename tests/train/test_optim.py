"""Optimizers: schedules against closed forms, groups by name, penalties by formula, state both ways."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ffn.gpt.transformer import Transformer, TransformerConfig
from ffn.train.optim import (
    Muon,
    ScheduledOptimizer,
    blocks_above,
    lr_factor,
    orthogonalise,
    parameter_groups,
)

CONFIG = TransformerConfig(
    vocab_size=11, dim=8, num_layers=1, num_heads=2, max_seq_len=8, position="learned", bias=True,
    qk_norm=True, tie_embeddings=False,
)  # fmt: skip
BLOCK_MATRICES = {
    *(f"blocks.0.attention.{name}_proj.weight" for name in "qkvo"),
    *(f"blocks.0.feed_forward.{name}_proj.weight" for name in ("gate", "up", "down")),
}


@given(
    st.integers(1, 60), st.integers(0, 30), st.floats(0, 1), st.sampled_from(["constant", "linear", "cosine"])
)
def test_schedules_rise_then_fall_to_the_floor(steps: int, warmup: int, floor: float, schedule) -> None:
    factors = [lr_factor(step, steps, schedule, warmup, floor) for step in range(steps + 1)]
    for step in range(min(warmup, steps)):
        assert factors[step] == (step + 1) / warmup
    falling = factors[warmup:]
    if falling and warmup < steps:
        assert falling[0] == 1.0
        assert falling[-1] == pytest.approx(1.0 if schedule == "constant" else floor)
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(falling))
    assert all(0 <= factor <= 1 + 1e-12 for factor in factors)


def test_schedules_have_their_closed_forms() -> None:
    for step in range(10, 110):
        done = (step - 10) / 100
        assert lr_factor(step, 110, "constant", 10, 0.1) == 1
        assert lr_factor(step, 110, "linear", 10, 0.1) == pytest.approx(1 - 0.9 * done)
        assert lr_factor(step, 110, "cosine", 10, 0.1) == pytest.approx(
            0.1 + 0.45 * (1 + math.cos(math.pi * done))
        )
    with pytest.raises(ValueError, match=r"^schedule .* 'step'$"):
        lr_factor(5, 10, "step")  # pyright: ignore[reportArgumentType]


def test_groups_hold_every_trainable_parameter_once() -> None:
    model = Transformer(CONFIG)
    model.embedding.position.weight.requires_grad_(False)
    groups = {name: set(group) for name, group in parameter_groups(model).items()}
    assert groups["block_matrices"] == BLOCK_MATRICES
    assert groups["other_matrices"] == {"head.weight"}
    everything = {name for name, p in model.named_parameters() if p.requires_grad}
    assert groups["rest"] == everything - BLOCK_MATRICES - {"head.weight"}
    assert "embedding.token.weight" in groups["rest"]


def quadratic(model: nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    targets = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in model.parameters()]
    return sum(((p - t) ** 2).sum() for p, t in zip(model.parameters(), targets, strict=True))


def step(model: nn.Module, optimizer: ScheduledOptimizer, factor: float = 1.0) -> None:
    quadratic(model).backward()
    optimizer.step(factor)
    optimizer.zero_grad()


def test_adamw_follows_its_formula_and_decays_matrices_only() -> None:
    """Decoupled decay and Adam (Loshchilov & Hutter), written out by hand in float64."""
    model = Transformer(CONFIG).double()
    lr, decay, betas = 0.01, 0.3, (0.8, 0.9)
    optimizer = ScheduledOptimizer(model, lr=lr, weight_decay=decay, betas=betas)
    decayed = BLOCK_MATRICES | {"head.weight"}
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    first = {name: torch.zeros_like(p) for name, p in expected.items()}
    second = {name: torch.zeros_like(p) for name, p in expected.items()}
    for t, factor in enumerate([0.5, 1.0, 0.25], start=1):
        quadratic(model).backward()
        for name, p in model.named_parameters():
            g, eta = p.grad, lr * factor
            first[name] = betas[0] * first[name] + (1 - betas[0]) * g
            second[name] = betas[1] * second[name] + (1 - betas[1]) * g**2
            unbiased = first[name] / (1 - betas[0] ** t), second[name] / (1 - betas[1] ** t)
            if name in decayed:
                expected[name] = expected[name] * (1 - eta * decay)
            expected[name] = expected[name] - eta * unbiased[0] / (unbiased[1].sqrt() + 1e-8)
        optimizer.step(factor)
        optimizer.zero_grad()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), expected[name], msg=name)


def test_muon_is_torchs_on_the_block_matrices_and_adamw_elsewhere() -> None:
    model, twin = Transformer(CONFIG), Transformer(CONFIG)
    twin.load_state_dict(model.state_dict())
    options = {"weight_decay": 0.1, "lr": 0.003}
    optimizer = ScheduledOptimizer(model, "muon", muon_lr=0.02, momentum=0.9, **options)
    named = dict(twin.named_parameters())
    muon = torch.optim.Muon(
        [named[n] for n in named if n in BLOCK_MATRICES], lr=0.01, momentum=0.9, weight_decay=0.1
    )
    rest = [p for n, p in named.items() if n not in BLOCK_MATRICES | {"head.weight"}]
    groups = [{"params": [named["head.weight"]]}, {"params": rest, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=0.0015, betas=(0.9, 0.95), weight_decay=0.1)
    for _ in range(2):
        step(model, optimizer, 0.5)
        quadratic(twin).backward()
        for each in (muon, adamw):
            each.step()
            each.zero_grad()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        tolerance = {"rtol": 0, "atol": 1e-3} if name in BLOCK_MATRICES else {}  # bfloat16, in another order
        torch.testing.assert_close(p, q, msg=name, **tolerance)


@pytest.mark.parametrize("stacked", [0, 1 << 16])
@pytest.mark.parametrize("shape", [(8, 8), (4, 12), (12, 4)])
def test_muon_is_torchs_to_rounding(shape: tuple[int, int], stacked: int, monkeypatch) -> None:
    """Several matrices of a shape, one without a gradient, over steps that build up momentum."""
    monkeypatch.setattr(Muon, "STACKED", stacked)
    ours = [nn.Parameter(torch.randn(shape)) for _ in range(4)]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    options = {"lr": 0.1, "weight_decay": 0.2, "momentum": 0.8}
    muon, reference = Muon(ours, **options), torch.optim.Muon(theirs, **options)
    for _ in range(3):
        before = [p.detach().clone() for p in theirs]
        for p, q in zip(ours[1:], theirs[1:], strict=True):
            p.grad = torch.randn(shape)
            q.grad = p.grad.clone()
        muon.step()
        reference.step()
        for p, q, old in zip(ours[1:], theirs[1:], before[1:], strict=True):
            assert (p - q).norm() <= (0.05 if stacked else 0.0) * (q - old).norm()
            p.data.copy_(q)
        assert torch.equal(ours[0], theirs[0])
    for p, q in zip(ours[1:], theirs[1:], strict=True):
        torch.testing.assert_close(muon.state[p], reference.state[q])


def test_orthogonalised_matrices_have_singular_values_near_one() -> None:
    group = Muon([nn.Parameter(torch.zeros(2, 2))], lr=1.0).param_groups[0]
    for shape in ((3, 16, 16), (2, 8, 24), (1, 24, 8)):
        singular = torch.linalg.svdvals(orthogonalise(torch.randn(shape), group).float())
        assert float(singular.min()) > 0.3
        assert float(singular.max()) < 1.3


def test_muon_without_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^optimizer=muon"):
        ScheduledOptimizer(nn.Linear(2, 3), "muon")


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_l1_is_the_proximal_step_on_matrices(optimizer) -> None:
    """The penalised step is the plain one, then soft thresholding by (learning rate)·l1: zeros are exact."""
    model = Transformer(CONFIG).double()
    plain = Transformer(CONFIG).double()
    plain.load_state_dict(model.state_dict())
    options = {"lr": 0.004, "muon_lr": 0.03}
    step(model, ScheduledOptimizer(model, optimizer, l1=2.0, **options), 0.5)
    step(plain, ScheduledOptimizer(plain, optimizer, **options), 0.5)
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        lr = 0.015 if optimizer == "muon" and name in BLOCK_MATRICES else 0.002
        shrunk = q.sign() * (q.abs() - lr * 2.0).clamp(min=0)
        matrix = name in BLOCK_MATRICES | {"head.weight"}
        torch.testing.assert_close(p, shrunk if matrix else q, msg=name)
        assert not matrix or int((p == 0).sum()) > 0


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_loaded_state_continues_exactly(optimizer) -> None:
    model = Transformer(CONFIG)
    first = ScheduledOptimizer(model, optimizer)
    step(model, first)
    twin = Transformer(CONFIG)
    twin.load_state_dict(model.state_dict())
    second = ScheduledOptimizer(twin, optimizer)
    second.load_state_tensors({name: tensor.clone() for name, tensor in first.state_tensors().items()})
    for _ in range(2):
        step(model, first, 0.7)
        step(twin, second, 0.7)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)
    for name, tensor in first.state_tensors().items():
        assert torch.equal(tensor, second.state_tensors()[name])
    with pytest.raises(ValueError, match=r"nose\.weight"):
        second.load_state_tensors({"nose.weight/exp_avg": torch.zeros(1)})


def test_a_model_inside_a_module_has_the_same_groups() -> None:
    model = Transformer(CONFIG)
    inside = nn.ModuleDict({"backbone": model, "head": nn.Linear(8, 3)})
    for group, names in parameter_groups(model).items():
        found = {name.removeprefix("backbone.") for name in parameter_groups(inside)[group]}
        assert found - {"head.weight", "head.bias"} == set(names) - {"head.weight"}
    assert "head.weight" in parameter_groups(inside)["other_matrices"]


def test_frozen_parameters_have_no_state_and_do_not_change() -> None:
    model = Transformer(CONFIG)
    for name, p in model.named_parameters():
        p.requires_grad_("feed_forward." in name)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = ScheduledOptimizer(model, "muon", weight_decay=0.5, l1=0.5)
    step(model, optimizer)
    names = {name.rpartition("/")[0] for name in optimizer.state_tensors()}
    assert names == {name for name in before if "feed_forward." in name}
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == (name not in names), name
    with pytest.raises(ValueError, match=r"^model must have a parameter"):
        ScheduledOptimizer(model.requires_grad_(False))


THREE = TransformerConfig(vocab_size=11, dim=8, num_layers=3, num_heads=2, tie_embeddings=False)


def test_blocks_above_counts_blocks_up_to_the_output() -> None:
    model = nn.ModuleDict({"backbone": Transformer(THREE), "classifier": nn.Linear(8, 2)})
    above = blocks_above(model)
    assert set(above) == {name for name, _ in model.named_parameters()}
    for name, count in above.items():
        _, part, *rest = name.split(".")
        assert count == {"embedding": 3, "blocks": 2 - int(rest[0]) if part == "blocks" else 0}.get(part, 0)
    assert set(blocks_above(nn.Linear(2, 2)).values()) == {0}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_layer_decay_lowers_the_rates_of_lower_blocks(optimizer) -> None:
    """lr c^(blocks above): each parameter moves as in a model that learns at that rate throughout."""
    model = Transformer(THREE).double()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    options = {"weight_decay": 0.1, "l1": 0.2}
    tolerance = 1e-4 if optimizer == "muon" else 1e-15  # bfloat16, stacked in another order
    decayed = ScheduledOptimizer(model, optimizer, lr=0.01, muon_lr=0.03, layer_decay=0.5, **options)
    for _ in range(2):
        step(model, decayed, 0.7)
    moved = {name: p.detach().clone() for name, p in model.named_parameters()}
    for count in range(4):
        model.load_state_dict(start)
        rate = 0.5**count
        plain = ScheduledOptimizer(model, optimizer, lr=0.01 * rate, muon_lr=0.03 * rate, **options)
        for _ in range(2):
            step(model, plain, 0.7)
        names = [name for name, above in blocks_above(model).items() if above == count]
        assert names
        for name in names:
            torch.testing.assert_close(
                moved[name], model.get_parameter(name), rtol=0, atol=tolerance, msg=name
            )
