"""Metrics against examples by hand, scikit-learn and the formulas of losses."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from ffn.classify.metrics import (
    AVERAGES,
    CLASS_METRICS,
    NUMBER_METRICS,
    accuracy,
    averaged,
    balanced_weights,
    binary_cross_entropy,
    confusion_matrix,
    mean_squared_error,
    precision_recall_f1,
    r2,
    roc_auc,
    score_classes,
    score_numbers,
)

TRUE = torch.tensor([0, 0, 0, 1, 1, 2])
PREDICTED = torch.tensor([0, 0, 1, 1, 0, 1])  # class 2 is never predicted
MATRIX = [[2, 1, 0], [1, 1, 0], [0, 1, 0]]


@st.composite
def predictions(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, int]:
    """True and predicted classes among K; some may not occur."""
    num_classes = draw(st.integers(2, 6))
    classes = st.integers(0, num_classes - 1)
    pairs = draw(st.lists(st.tuples(classes, classes), min_size=1, max_size=40))
    true, predicted = (torch.tensor(column) for column in zip(*pairs, strict=True))
    return true, predicted, num_classes


EIGHTHS = st.integers(-40, 40).map(lambda whole: whole / 8)  # exact in every float dtype, with many ties
NUMBERS = st.lists(st.tuples(EIGHTHS, EIGHTHS), min_size=1, max_size=40)
SCORED = st.lists(st.tuples(st.integers(0, 1), EIGHTHS), min_size=1, max_size=40)


def columns(pairs: list[tuple]) -> tuple[torch.Tensor, torch.Tensor]:
    first, second = (torch.tensor(column) for column in zip(*pairs, strict=True))
    return first, second


def test_a_confusion_matrix_by_hand() -> None:
    matrix = confusion_matrix(TRUE, PREDICTED, 3)
    assert matrix.tolist() == MATRIX
    assert matrix.dtype == torch.int64
    assert accuracy(matrix) == 0.5
    third = 1 / 3
    expected = [[2 / 3, 2 / 3, 2 / 3], [third, 0.5, 0.4], [0, 0, 0]]
    torch.testing.assert_close(precision_recall_f1(matrix), torch.tensor(expected, dtype=torch.float64))
    assert averaged(matrix, "macro") == pytest.approx((third, 7 / 18, 16 / 45))
    assert averaged(matrix, "micro") == pytest.approx((0.5, 0.5, 0.5))
    assert averaged(matrix, "weighted") == pytest.approx((4 / 9, 0.5, 7 / 15))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.uint16, torch.int32])
def test_class_numbers_of_any_integer_dtype(dtype: torch.dtype) -> None:
    true, predicted = torch.tensor([0, 1, 1]), torch.tensor([1, 1, 0])
    assert confusion_matrix(true.to(dtype), predicted.to(dtype), 2).tolist() == [[0, 1], [1, 1]]


def test_roc_auc_by_hand() -> None:
    true = torch.tensor([0, 0, 1, 1])
    assert roc_auc(true, torch.tensor([0.1, 0.4, 0.35, 0.8])) == 0.75
    assert roc_auc(true, torch.tensor([1, 2, 3, 4])) == 1.0
    assert roc_auc(true, torch.tensor([4.0, 3.0, 2.0, 1.0])) == 0.0
    assert roc_auc(true, torch.tensor([0.0, -0.0, 0.0, -0.0])) == 0.5, "ties count half"
    assert math.isnan(roc_auc(torch.tensor([1, 1]), torch.tensor([0.1, 0.2])))


@given(SCORED)
def test_roc_auc_is_the_chance_to_rank_a_pair_right(pairs: list[tuple[int, float]]) -> None:
    ones = [score for true, score in pairs if true]
    zeros = [score for true, score in pairs if not true]
    won = [(one > zero) + (one == zero) / 2 for one in ones for zero in zeros]
    found = roc_auc(*columns(pairs))
    assert found == pytest.approx(sum(won) / len(won), abs=1e-15) if won else math.isnan(found)
    true, scores = columns(pairs)
    assert roc_auc(true, 3 * scores.to(torch.bfloat16) - 1) == pytest.approx(found, nan_ok=True)
    assert roc_auc(1 - true, scores) == pytest.approx(1 - found, nan_ok=True)


def test_regression_by_hand() -> None:
    true, predicted = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 2.0, 5.0])
    assert mean_squared_error(true, predicted) == pytest.approx(4 / 3)
    assert r2(true, predicted) == -1.0
    assert r2(true, true.new_full((3,), 2.0)) == 0.0
    constant = torch.full((3,), 0.1)
    assert (r2(constant, constant), r2(constant, true)) == (1.0, 0.0)
    assert math.isnan(r2(true[:1], true[:1]))


@given(predictions())
def test_class_metrics_equal_scikit_learn(case: tuple[torch.Tensor, torch.Tensor, int]) -> None:
    oracle = pytest.importorskip("sklearn.metrics")
    true, predicted, num_classes = case
    arrays, labels = (true.numpy(), predicted.numpy()), list(range(num_classes))
    matrix = confusion_matrix(true, predicted, num_classes)
    assert matrix.tolist() == oracle.confusion_matrix(*arrays, labels=labels).tolist()
    assert accuracy(matrix) == pytest.approx(oracle.accuracy_score(*arrays))
    common = {"labels": labels, "zero_division": 0}
    each = oracle.precision_recall_fscore_support(*arrays, **common)
    for found, expected in zip(precision_recall_f1(matrix).T, each, strict=False):
        assert found.numpy() == pytest.approx(expected)
    for how in AVERAGES:
        expected = oracle.precision_recall_fscore_support(*arrays, average=how, **common)
        assert averaged(matrix, how) == pytest.approx(expected[:3]), how
    if len(set(true.tolist())) == num_classes:
        weights = pytest.importorskip("sklearn.utils.class_weight").compute_class_weight
        balanced = weights("balanced", classes=torch.tensor(labels).numpy(), y=arrays[0])
        assert balanced_weights(true, num_classes).numpy() == pytest.approx(balanced)


@given(SCORED)
def test_roc_auc_equals_scikit_learn(pairs: list[tuple[int, float]]) -> None:
    oracle = pytest.importorskip("sklearn.metrics")
    true, scores = columns(pairs)
    if len(set(true.tolist())) == 2:  # else it warns, and gives NaN as we do
        assert roc_auc(true, scores) == pytest.approx(oracle.roc_auc_score(true.numpy(), scores.numpy()))


@given(NUMBERS)
def test_regression_equals_scikit_learn(pairs: list[tuple[float, float]]) -> None:
    oracle = pytest.importorskip("sklearn.metrics")
    true, predicted = columns(pairs)
    arrays = true.double().numpy(), predicted.double().numpy()
    assert mean_squared_error(true, predicted) == pytest.approx(oracle.mean_squared_error(*arrays))
    if len(true) > 1:
        assert r2(true, predicted) == pytest.approx(oracle.r2_score(*arrays))


@given(predictions(), st.sampled_from([0.0, 0.1, 1.0]), st.booleans())
def test_cross_entropy_equals_its_formula(
    case: tuple[torch.Tensor, torch.Tensor, int], smoothing: float, weighted: bool
) -> None:
    """The divisor sums weights of true classes; each smoothed share has the weight of its class."""
    true, _, num_classes = case
    logits = torch.randn(len(true), num_classes, dtype=torch.float64)
    weights = torch.rand(num_classes, dtype=torch.float64) + 0.1 if weighted else None
    found = F.cross_entropy(logits, true, weights, label_smoothing=smoothing)
    total, divisor = 0.0, 0.0
    for row, target in zip(logits.tolist(), true.tolist(), strict=True):
        log_z = math.log(sum(map(math.exp, row)))
        divisor += weights[target].item() if weights is not None else 1.0
        for number, logit in enumerate(row):
            share = (1 - smoothing) * (number == target) + smoothing / num_classes
            total += share * (log_z - logit) * (weights[number].item() if weights is not None else 1.0)
    assert found.item() == pytest.approx(total / divisor, abs=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weights", [None, (0.25, 3.0)])
def test_binary_cross_entropy_equals_its_formula(
    smoothing: float, weights: tuple[float, float] | None
) -> None:
    logits = (4 * torch.randn(50, dtype=torch.float64)).requires_grad_()
    true = torch.randint(2, (50,))
    zero, one = weights or (1.0, 1.0)
    share = true * (1 - smoothing) + smoothing / 2
    chance = logits.sigmoid()
    each = -(one * share * chance.log() + zero * (1 - share) * (1 - chance).log())
    expected = each.sum() / torch.where(true == 1, one, zero).sum()
    found = binary_cross_entropy(
        logits, true, None if weights is None else torch.tensor(weights, dtype=torch.float64), smoothing
    )
    torch.testing.assert_close(found, expected)
    slopes = [torch.autograd.grad(loss, logits)[0] for loss in (found, expected)]
    torch.testing.assert_close(*slopes)
    if weights is None:
        torch.testing.assert_close(found, F.binary_cross_entropy_with_logits(logits, share.double()))


def test_binary_cross_entropy_of_large_logits() -> None:
    logits = torch.tensor([200.0, -200.0], requires_grad=True)
    loss = binary_cross_entropy(logits, torch.tensor([0, 0]))
    loss.backward()
    assert loss.item() == 100.0
    assert logits.grad is not None
    assert logits.grad.tolist() == [0.5, 0.0]


def test_losses_equal_scikit_learn() -> None:
    oracle = pytest.importorskip("sklearn.metrics")
    logits, true = torch.randn(30, 4, dtype=torch.float64), torch.arange(30) % 4
    weights = torch.tensor([0.5, 1.0, 2.0, 4.0], dtype=torch.float64)
    expected = oracle.log_loss(true.numpy(), logits.softmax(1).numpy(), sample_weight=weights[true].numpy())
    assert F.cross_entropy(logits, true, weights).item() == pytest.approx(expected)
    expected = oracle.log_loss((true > 1).numpy(), logits[:, 0].sigmoid().numpy())
    assert binary_cross_entropy(logits[:, 0], (true > 1).long()).item() == pytest.approx(expected)
    expected = oracle.mean_squared_error(logits[:, 0].numpy(), logits[:, 1].numpy())
    assert F.mse_loss(logits[:, 0], logits[:, 1]).item() == pytest.approx(expected)


def test_balanced_weights_by_hand() -> None:
    true = torch.tensor([0, 0, 0, 1])
    assert balanced_weights(true, 2).tolist() == pytest.approx([2 / 3, 2.0])
    with pytest.raises(ValueError, match="class 2"):
        balanced_weights(true, 3)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: confusion_matrix(TRUE[:0], TRUE[:0], 3), "no rows"),
        (lambda: confusion_matrix(TRUE, PREDICTED[:3], 3), r"got \(6,\) and \(3,\)"),
        (lambda: confusion_matrix(TRUE[None], PREDICTED[None], 3), r"got \(1, 6\)"),
        (lambda: confusion_matrix(TRUE, PREDICTED, 2), "0 .. 1, got 2"),
        (lambda: confusion_matrix(TRUE, PREDICTED - 1, 3), "got -1"),
        (lambda: accuracy(torch.zeros(2, 2, dtype=torch.int64)), "no rows"),
        (lambda: precision_recall_f1(torch.zeros(2, 2, dtype=torch.int64)), "no rows"),
        (lambda: averaged(torch.eye(2).long(), "samples"), "^how must be .*'samples'"),
        (lambda: roc_auc(TRUE, TRUE.float()), "0 .. 1, got 2"),
        (lambda: roc_auc(TRUE[:4], torch.ones(4, 1)), r"got \(4,\) and \(4, 1\)"),
        (lambda: roc_auc(TRUE[:0], torch.ones(0)), "no rows"),
        (
            lambda: roc_auc(TRUE[:2], torch.tensor([0.1, math.nan])),
            "^scores must be finite, got nan in row 1",
        ),
        (lambda: mean_squared_error(torch.ones(0), torch.ones(0)), "no rows"),
        (lambda: mean_squared_error(torch.ones(4), torch.ones(4, 1)), r"got \(4,\) and \(4, 1\)"),
        (
            lambda: mean_squared_error(torch.ones(2), torch.tensor([math.inf, 1.0])),
            "^predicted must be finite, got inf in row 0",
        ),
        (lambda: r2(torch.tensor([1.0, math.nan]), torch.ones(2)), "^true must be finite, got nan in row 1"),
        (lambda: score_classes(TRUE, PREDICTED, "abc", torch.ones(6)), "^scores must be None"),
    ],
)
def test_wrong_arguments_raise(wrong: object, message: str) -> None:
    assert callable(wrong)
    with pytest.raises(ValueError, match=message) as caught:
        wrong()
    assert "\n" not in str(caught.value)


def test_class_numbers_must_be_integers() -> None:
    with pytest.raises(TypeError, match=r"^predicted must have an integer dtype"):
        confusion_matrix(TRUE, PREDICTED.float(), 3)


def test_scores_of_classes() -> None:
    scores = score_classes(TRUE, PREDICTED, ["体育", "b\n", "c"])
    assert set(scores.values) == set(CLASS_METRICS) - {"roc_auc"}
    assert scores.values["f1_macro"] == pytest.approx(16 / 45)
    found = json.loads(json.dumps(scores.to_dict(), allow_nan=False))
    assert found["confusion"] == MATRIX
    assert found["classes"][2] == {"class": "c", "precision": 0.0, "recall": 0.0, "f1": 0.0, "rows": 1}
    assert found["accuracy"] == 0.5
    assert scores.table() == "\n".join(
        [
            "          precision  recall      f1  rows",
            "体育         0.6667  0.6667  0.6667     3",
            "'b\\n'        0.3333  0.5000  0.4000     2",
            "c            0.0000  0.0000  0.0000     1",
            "macro        0.3333  0.3889  0.3556",
            "micro        0.5000  0.5000  0.5000",
            "weighted     0.4444  0.5000  0.4667",
            "accuracy                     0.5000     6",
            "",
            "true \\ predicted  体育  'b\\n'  c",
            "体育                 2      1  0",
            "'b\\n'                1      1  0",
            "c                    0      1  0",
        ]
    )


def test_two_classes_have_roc_auc_if_both_occur() -> None:
    true, scores = torch.tensor([0, 1, 1]), torch.tensor([-1.0, 2.0, -3.0])
    both = score_classes(true, (scores > 0).long(), ["neg", "pos"], scores)
    assert set(both.values) == set(CLASS_METRICS)
    assert both.values["roc_auc"] == 0.5
    assert both.table().splitlines()[7].split() == ["roc_auc", "0.5000", "3"]
    one = score_classes(true[1:], (scores > 0).long()[1:], ["neg", "pos"], scores[1:])
    assert "roc_auc" not in one.values
    assert one.values["recall_weighted"] == 0.5


def test_a_wide_confusion_matrix_is_not_printed() -> None:
    classes = [f"class {number}" for number in range(13)]
    table = score_classes(torch.arange(13), torch.arange(13), classes).table()
    assert len(table.splitlines()) == 1 + 13 + 4


def test_scores_of_numbers() -> None:
    scores = score_numbers(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 2.0, 5.0]))
    assert tuple(scores.values) == NUMBER_METRICS
    assert scores.table() == "mse    1.3333\nr2    -1.0000\nrows        3"
    assert scores.to_dict() == {"rows": 3, "mse": pytest.approx(4 / 3), "r2": -1.0}
    assert set(score_numbers(torch.ones(1), torch.ones(1)).values) == {"mse"}
    assert "1e-06" in score_numbers(torch.zeros(2), torch.full((2,), 1e-3)).table()


def test_shares_are_exact_in_double_precision():
    matrix = torch.tensor([[2, 1], [0, 0]])
    assert accuracy(matrix) == 2 / 3
    assert averaged(matrix, "micro") == (2 / 3, 2 / 3, 2 / 3)
