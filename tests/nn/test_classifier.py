"""Classifier: pooling, padding, dropout and wrong arguments."""

import pytest
import torch
from torch import Tensor, nn

from ffn.nn.classifier import Classifier, ClassifierHead, pool
from tests.models import F64, build, tokens_of

ENCODER = {"causal": False, "head": "none"}


def classifier(**options) -> Classifier:
    backbone = build(causal=options.pop("causal", False), head="none")
    return Classifier(backbone, 3, **options).eval()


@pytest.mark.parametrize("pooling", ["first", "mean", "last"])
def test_logits_equal_their_formula(pooling: str) -> None:
    model = classifier(pooling=pooling, transform="tanh", bias=True)
    nn.init.normal_(model.head.out_proj.bias)
    tokens = tokens_of(2, 5)
    hidden = model.backbone.hidden(tokens)
    pooled = {"first": hidden[:, 0], "mean": hidden.mean(1), "last": hidden[:, 4]}[pooling]
    head = model.head
    assert head.dense is not None
    expected = torch.tanh(pooled @ head.dense.weight.T + head.dense.bias) @ head.out_proj.weight.T
    torch.testing.assert_close(model(tokens), expected + head.out_proj.bias, rtol=0, atol=1e-12)
    assert model.num_classes == 3


@pytest.mark.parametrize("pooling", ["first", "mean", "last"])
@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padding_does_not_change_the_logits(pooling: str, side: str) -> None:
    model = classifier(pooling=pooling)
    texts = [tokens_of(n) for n in (5, 1, 3)]
    alone = torch.cat([model(text[None]) for text in texts])
    rows, masks = [], []
    for text in texts:
        room = 7 - len(text)
        before = {"left": room, "right": 0, "both": room // 2}[side]
        rows.append(nn.functional.pad(text, (before, room - before), value=11))
        masks.append(nn.functional.pad(torch.ones_like(text), (before, room - before)))
    together = model(torch.stack(rows), attention_mask=torch.stack(masks))
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_padding_does_not_change_the_logits_of_a_decoder(pooling: str) -> None:
    model = classifier(pooling=pooling, causal=True)
    text = tokens_of(1, 4)
    padded = nn.functional.pad(text, (0, 3), value=5)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0, 0]])
    torch.testing.assert_close(model(padded, attention_mask=mask), model(text), rtol=0, atol=1e-12)


def test_pooling_ignores_nan_at_padding() -> None:
    hidden = torch.randn(2, 3, 4, dtype=F64)
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    hidden[mask == 0] = torch.nan
    for pooling in ("first", "mean", "last"):
        assert pool(hidden, mask, pooling).isfinite().all()


def test_last_pooling_has_no_bias_by_default() -> None:
    assert classifier(pooling="mean").head.out_proj.bias is not None
    assert classifier(pooling="last").head.out_proj.bias is None
    assert classifier(pooling="last", bias=True).head.out_proj.bias is not None


def test_dropout_comes_before_out_proj() -> None:
    head = ClassifierHead(8, 8, dropout=0.5, bias=False, dtype=F64)
    head.out_proj.weight.data = torch.eye(8, dtype=F64)
    dropped = head(torch.ones(1000, 8, dtype=F64))
    assert set(dropped.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(head.eval()(torch.ones(1, 8, dtype=F64)), torch.ones(1, 8, dtype=F64))


def test_the_head_has_the_dtype_and_device_of_the_backbone() -> None:
    backbone = build(torch.bfloat16, **ENCODER)
    assert Classifier(backbone, 2).head.out_proj.weight.dtype == torch.bfloat16
    meta = ClassifierHead(4, 2, "relu", device="meta")
    assert meta.out_proj.weight.is_meta
    assert "transform=relu" in repr(meta)


def _refused(**options) -> Tensor:
    return Classifier(build(causal=options.pop("causal", False), head="none"), **options)(tokens_of(1, 2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 2, "pooling": "max"}, r"^pooling must be .*'max'$"),
        ({"num_classes": 2, "transform": "gelu"}, r"^transform must be .*'gelu'$"),
        ({"num_classes": 2, "dropout": 1.0}, r"^dropout"),
        ({"num_classes": 2, "causal": True}, r"^pooling must be .*'first'$"),
        ({"num_classes": 0}, r"num_classes"),
    ],
)
def test_wrong_arguments_raise(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _refused(**options)
