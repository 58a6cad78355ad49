"""Frozen weights stay bit-identical, cached features train the same head, the best epoch is kept."""

import dataclasses

import pytest
import torch

from ffn.classify.batches import TextEncoder
from ffn.classify.config import FitConfig
from ffn.classify.loop import FeatureSource, Outcome, TokenSource, cache_features, compute_logits, fit
from ffn.classify.objective import Objective
from ffn.gpt.freeze import train_only
from ffn.gpt.transformer import Transformer, TransformerConfig
from ffn.nn.classifier import Classifier
from ffn.text.tokenizer import ByteTokenizer
from tests.classify.samples import texts

CONFIG = TransformerConfig(
    vocab_size=256,
    dim=16,
    num_layers=2,
    num_heads=2,
    hidden_dim=24,
    max_seq_len=64,
    causal=False,
    head="none",
)
OBJECTIVE = Objective("cross_entropy", ("food", "sea"))
FIT = FitConfig(epochs=3, batch_size=8, lr=1e-2, precision="float32")


Data = tuple[TokenSource | FeatureSource, torch.Tensor]


def source(count: int, seed: int = 0, length: int | None = None) -> tuple[TokenSource, torch.Tensor]:
    """Rows of bytes with targets; `length` cuts or fills all rows to one length, so there is no padding."""
    rows = texts(count, 2, seed)
    encode = TextEncoder(ByteTokenizer(), length or 64)
    words = [text.ljust(length or 0) for text, _ in rows]
    targets = torch.tensor([OBJECTIVE.classes.index(name) for _, name in rows])
    return TokenSource(encode(words)[0], encode), targets


def model_of(seed: int = 0, dtype: torch.dtype = torch.float32, **options) -> Classifier:
    torch.manual_seed(seed)
    return Classifier(Transformer(dataclasses.replace(CONFIG, **options), dtype=dtype), 2, "mean")


def weights(model: Classifier) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def run(model: Classifier, train: Data, val: Data, config: FitConfig = FIT, **options) -> Outcome:
    sources, targets = {"train": train[0], "val": val[0]}, {"train": train[1], "val": val[1]}
    return fit(model, sources, targets, OBJECTIVE, config, seed=1, **options)


def cached(model: Classifier, data: tuple[TokenSource, torch.Tensor]) -> Data:
    return cache_features(model, data[0]), data[1]


def test_training_learns_and_is_reproducible() -> None:
    first, second = model_of(), model_of()
    config = dataclasses.replace(FIT, epochs=6)
    outcome = run(first, source(480), source(60, seed=1), config)
    run(second, source(480), source(60, seed=1), config)
    assert outcome.history[-1]["train_loss"] < outcome.history[0]["train_loss"]
    assert outcome.best is not None
    assert outcome.best > 0.8
    assert all(
        torch.equal(a, b) for a, b in zip(weights(first).values(), weights(second).values(), strict=True)
    )
    assert not first.training


def test_each_epoch_shuffles_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    train, seen = source(40), []

    def logits(model, index, generator):
        seen.append(tuple(index))
        return TokenSource.logits(train[0], model, index, generator)

    monkeypatch.setattr(train[0], "logits", logits)
    run(model_of(), train, source(16, seed=1), dataclasses.replace(FIT, epochs=2))
    assert len(seen) == 10
    assert sorted(row for index in seen[:5] for row in index) == list(range(40))
    assert seen[:5] != seen[5:]


@pytest.mark.parametrize("what", ["head", "ffn", "last:1"])
def test_frozen_weights_stay_bit_identical(what: str) -> None:
    model = model_of(dropout=0.1)
    train_only(model, what)
    before, trained = weights(model), {n for n, p in model.named_parameters() if p.requires_grad}
    config = dataclasses.replace(FIT, weight_decay=0.5, l1=0.01, patience=0, metric="loss")
    outcome = run(model, source(40), source(20, seed=1), config)
    assert outcome.best_epoch
    for name, tensor in weights(model).items():
        assert torch.equal(tensor, before[name]) == (name not in trained), name
        if name not in trained:
            assert dict(model.named_parameters())[name].grad is None


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_cached_features_train_the_same_head(dropout: float) -> None:
    models = [model_of(dropout=dropout), model_of(dropout=dropout)]
    train, val = source(40, length=24), source(16, seed=1, length=24)
    for model in models:
        train_only(model, "head")
    slow, fast = run(models[0], train, val), run(models[1], cached(models[1], train), cached(models[1], val))
    assert torch.equal(models[0].head.out_proj.weight, models[1].head.out_proj.weight)
    without = [{k: v for k, v in row.items() if k != "seconds"} for row in slow.history]
    assert without == [{k: v for k, v in row.items() if k != "seconds"} for row in fast.history]


def test_cached_features_with_padding_train_the_same_head() -> None:
    models = [model_of(dtype=torch.float64), model_of(dtype=torch.float64)]
    train, val = source(40), source(16, seed=1)
    for model in models:
        train_only(model, "head")
    run(models[0], train, val)
    run(models[1], cached(models[1], train), cached(models[1], val))
    pair = [model.head.out_proj.weight for model in models]
    torch.testing.assert_close(*pair, rtol=1e-10, atol=1e-12)


def test_the_cache_runs_the_backbone_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, train = model_of(), source(40)
    train_only(model, "head")
    rows = 0
    hidden = Transformer.hidden

    def counted(self, tokens, **options):
        nonlocal rows
        rows += len(tokens)
        return hidden(self, tokens, **options)

    monkeypatch.setattr(Transformer, "hidden", counted)
    features = cached(model, train)
    assert isinstance(features[0], FeatureSource)
    assert features[0].features.shape == (40, 16)
    run(model, features, features)
    assert rows == 40


class Watching:
    """Records progress; raises KeyboardInterrupt at step `stop_at`."""

    def __init__(self, stop_at: int = 0) -> None:
        self.losses, self.rows, self.stop_at = [], [], stop_at

    def step(self, loss: float, speed: float) -> None:
        self.losses.append(loss)
        if len(self.losses) == self.stop_at:
            raise KeyboardInterrupt

    def epoch(self, row: dict[str, float], best: bool) -> None:
        self.rows.append((row, best))


def worse_each_epoch(monkeypatch: pytest.MonkeyPatch, values: list[float]) -> list[dict[str, torch.Tensor]]:
    """Make validation return these losses, one per epoch; return the weights it saw."""
    seen: list[dict[str, torch.Tensor]] = []

    def told(model, source, precision):
        seen.append(weights(model))
        return torch.empty(0)

    monkeypatch.setattr("ffn.classify.loop.compute_logits", told)
    monkeypatch.setattr("ffn.classify.loop._values", lambda *_: {"loss": values[len(seen) - 1]})
    return seen


def test_early_stopping_keeps_the_best_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = worse_each_epoch(monkeypatch, [3.0, 1.0, 2.0, 1.5, 9.0])
    model = model_of()
    config = dataclasses.replace(FIT, epochs=9, patience=2, metric="loss")
    outcome = run(model, source(20), source(10), config)
    assert (outcome.stopped, outcome.best, outcome.best_epoch, len(outcome.history)) == ("early", 1.0, 2, 4)
    assert all(torch.equal(tensor, seen[1][name]) for name, tensor in weights(model).items())


def test_patience_0_never_stops_early(monkeypatch: pytest.MonkeyPatch) -> None:
    worse_each_epoch(monkeypatch, [1.0, 2.0, 3.0, 4.0, 5.0])
    config = dataclasses.replace(FIT, epochs=5, patience=0, metric="loss")
    outcome = run(model_of(), source(20), source(10), config)
    assert (outcome.stopped, outcome.best_epoch, len(outcome.history)) == ("finished", 1, 5)


def test_ctrl_c_keeps_the_best_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = worse_each_epoch(monkeypatch, [3.0, 2.0, 1.0])
    model, watcher = model_of(), Watching(stop_at=8)  # three steps an epoch
    outcome = run(model, source(20), source(10), dataclasses.replace(FIT, metric="loss"), watcher=watcher)
    assert (outcome.stopped, outcome.best_epoch) == ("interrupted", 2)
    assert all(torch.equal(tensor, seen[1][name]) for name, tensor in weights(model).items())
    with pytest.raises(KeyboardInterrupt):
        run(model_of(), source(20), source(10), watcher=Watching(stop_at=2))


def test_the_watcher_receives_every_step_and_epoch() -> None:
    watcher = Watching()
    outcome = run(model_of(), source(20), source(10), watcher=watcher)
    assert len(watcher.losses) == 9
    assert [row for row, _ in watcher.rows] == outcome.history
    assert watcher.rows[0][1]
    first = sum(watcher.losses[:3]) / 3
    assert outcome.history[0]["train_loss"] == pytest.approx(first)


def test_a_loss_that_is_not_finite_raises() -> None:
    model = model_of()
    model.head.out_proj.weight.data.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match=r"^step 1: the loss is nan"):
        run(model, source(20), source(10))


def test_an_undefined_metric_raises() -> None:
    val, targets = source(10)
    options = dataclasses.replace(FIT, metric="roc_auc")
    with pytest.raises(ValueError, match=r"^train.metric=roc_auc"):
        run(model_of(), source(20), (val, torch.zeros_like(targets)), options)


def test_logits_are_in_the_order_of_the_rows() -> None:
    model, (rows, _) = model_of(), source(40)
    logits = compute_logits(model, rows)
    alone = torch.cat([model(torch.tensor([row])) for row in rows.rows]).double()
    torch.testing.assert_close(logits, alone, rtol=0, atol=1e-6)
    assert logits.dtype == torch.float64


def test_the_history_holds_the_validation_loss() -> None:
    model, val = model_of(), source(40)
    outcome = run(model, source(20), val, dataclasses.replace(FIT, epochs=1))
    expected = OBJECTIVE.loss(compute_logits(model, val[0]), val[1]).item()
    assert outcome.history[0]["loss"] == pytest.approx(expected, abs=1e-6)


def test_word_dropout_applies_in_training_only() -> None:
    model, (rows, _) = model_of(), source(20)
    dropping = dataclasses.replace(rows, word_dropout=0.5)
    assert torch.equal(compute_logits(model, dropping), compute_logits(model, rows))
    generator = torch.Generator().manual_seed(0)
    model.eval()
    changed = dropping.logits(model, range(20), generator) != rows.logits(model, range(20), generator)
    assert changed.any(1).sum() > 15
