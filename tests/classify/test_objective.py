"""Losses against their formulas, predictions from logits, and class weights from words."""

import math

import pytest
import torch

from ffn.classify.objective import METRICS, Objective, better, parse_class_weights

F64 = torch.float64
TARGETS = torch.tensor([0, 2, 1, 2, 0])
WEIGHTS = torch.tensor([0.5, 1.0, 3.0])


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_cross_entropy(smoothing: float, weights: torch.Tensor | None) -> None:
    logits = torch.randn(5, 3, dtype=F64)
    objective = Objective("cross_entropy", ("a", "b", "c"), weights, smoothing)
    weight = torch.ones(3, dtype=F64) if weights is None else weights.double()
    logs = logits - logits.exp().sum(1, keepdim=True).log()
    wanted = (1 - smoothing) * torch.eye(3, dtype=F64)[TARGETS] + smoothing / 3
    expected = -(wanted * weight * logs).sum() / weight[TARGETS].sum()
    torch.testing.assert_close(objective.loss(logits, TARGETS), expected)
    torch.testing.assert_close(objective.predictions(logits), logs.exp())
    assert objective.num_logits == 3


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weights", [None, WEIGHTS[:2]])
def test_binary_cross_entropy(smoothing: float, weights: torch.Tensor | None) -> None:
    logits, targets = torch.randn(5, 1, dtype=F64), TARGETS.clamp(max=1)
    objective = Objective("binary_cross_entropy", ("no", "yes"), weights, smoothing)
    weight = torch.ones(2, dtype=F64) if weights is None else weights.double()
    p = 1 / (1 + (-logits[:, 0]).exp())
    wanted = targets * (1 - smoothing) + smoothing / 2
    loss = -(wanted * p.log() * weight[1] + (1 - wanted) * (1 - p).log() * weight[0])
    torch.testing.assert_close(objective.loss(logits, targets), loss.sum() / weight[targets].sum())
    torch.testing.assert_close(objective.predictions(logits), torch.stack([1 - p, p], 1))
    assert objective.num_logits == 1
    with pytest.raises(ValueError, match=r"^train.loss=binary_cross_entropy needs two classes"):
        Objective("binary_cross_entropy", ("a", "b", "c"))


def test_squared_error_has_the_units_of_the_labels() -> None:
    logits, targets = torch.randn(5, 1, dtype=F64), torch.randn(5, dtype=F64) * 30 + 100
    objective = Objective("mse", center=100.0, scale=30.0)
    values = 100.0 + 30.0 * logits[:, 0]
    torch.testing.assert_close(objective.predictions(logits), values)
    expected = ((values - targets) ** 2).mean()
    torch.testing.assert_close(objective.loss(logits, targets) * 900.0, expected)
    found = objective.scores(targets, values).values
    assert math.isclose(found["mse"], expected.item())
    assert torch.equal(objective.wrongness(targets, values), (values - targets) ** 2)


def test_the_loss_of_half_precision_logits_is_float32() -> None:
    loss = Objective("cross_entropy", ("a", "b")).loss(
        torch.zeros(2, 2, dtype=torch.bfloat16), TARGETS[:2] // 2
    )
    assert loss.dtype == torch.float32


def test_metrics_belong_to_the_loss() -> None:
    logits = torch.randn(4, 2, dtype=F64)
    objective = Objective("cross_entropy", ("a", "b"))
    found = objective.scores(torch.tensor([0, 1, 1, 0]), objective.predictions(logits))
    assert {"loss", *found.values} == set(METRICS["cross_entropy"])
    assert better("accuracy", 0.5, None)
    assert better("accuracy", 0.5, 0.4)
    assert not better("accuracy", 0.5, 0.5)
    assert better("loss", 0.4, 0.5)
    assert better("mse", 0.4, 0.5)
    assert not better("r2", 0.4, 0.5)


def test_wrongness_is_one_minus_the_probability_of_the_true_class() -> None:
    predictions = torch.tensor([[0.9, 0.1], [0.3, 0.7]], dtype=F64)
    wrong = Objective("cross_entropy", ("a", "b")).wrongness(torch.tensor([1, 1]), predictions)
    torch.testing.assert_close(wrong, torch.tensor([0.9, 0.3], dtype=F64))


def test_class_weights_are_parsed() -> None:
    classes = ("a", "b:c", "d")
    assert parse_class_weights("none", classes, TARGETS) is None
    balanced = parse_class_weights("balanced", classes, TARGETS)
    torch.testing.assert_close(balanced, torch.tensor([5 / 6, 5 / 3, 5 / 6]))
    given = parse_class_weights("d:3, a:0.5,b:c:1", classes, TARGETS)
    torch.testing.assert_close(given, torch.tensor([0.5, 1.0, 3.0]))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("a:1", r"^train.class_weights: .*b$"),
        ("a:1,c:1", r"^train.class_weights must be .* a, b, got 'c:1'$"),
        ("a:1,b:x", r"^train.class_weights must be .*'b:x'$"),
        ("a:1,b:0", r"^train.class_weights must be .*'b:0'$"),
        ("a:1,b:nan", r"^train.class_weights must be .*'b:nan'$"),
        ("often", r"^train.class_weights must be .*'often'$"),
    ],
)
def test_wrong_class_weights_raise(words: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_class_weights(words, ("a", "b"), TARGETS.clamp(max=1))


def test_regression_has_no_class_weights() -> None:
    with pytest.raises(ValueError, match=r"^train.class_weights must be none"):
        parse_class_weights("balanced", (), TARGETS)
