"""Attention masks: integers as tokenizers give them, the loss, wrong shapes and dtypes."""

import dataclasses

import pytest
import torch

from ffn.gpt.transformer import Transformer
from ffn.nn.attention import LayerCache
from tests.models import SMALL

TOKENS = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 0, 0]])
REAL = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_integer_masks_equal_bool_masks(dtype: torch.dtype) -> None:
    for causal in (True, False):
        model = Transformer(dataclasses.replace(SMALL, causal=causal), dtype=torch.float64)
        want = model(TOKENS, attention_mask=REAL.bool())
        assert torch.equal(model(TOKENS, attention_mask=REAL.to(dtype)), want)
        torch.testing.assert_close(want[1:, :3], model(TOKENS[1:, :3]))


def test_the_loss_of_a_padded_batch_is_that_of_its_texts() -> None:
    model = Transformer(dataclasses.replace(SMALL, causal=False), dtype=torch.float64)
    targets = torch.where(REAL.bool(), TOKENS, -100)
    together = model.loss(TOKENS, targets, attention_mask=REAL)
    alone = 5 * model.loss(TOKENS[:1], targets[:1]) + 3 * model.loss(TOKENS[1:, :3], targets[1:, :3])
    torch.testing.assert_close(together, alone / 8)


def test_masks_of_a_wrong_shape_or_dtype_are_refused() -> None:
    model = Transformer(SMALL)
    for wrong in (REAL[:1], REAL[:, 1:], REAL[:, None]):
        with pytest.raises(ValueError, match=r"^attention_mask\b.*\(2, 5\)"):
            model(TOKENS, attention_mask=wrong)
    with pytest.raises(TypeError, match=r"^attention_mask\b.*float32"):
        model.loss(TOKENS, TOKENS, attention_mask=REAL.float())
    cache = [LayerCache(6) for _ in model.blocks]
    with torch.no_grad():
        model(TOKENS, cache=cache)
        with pytest.raises(ValueError, match=r"^attention_mask\b.*\(2, 6\).*\(2, 5\)"):
            model(TOKENS[:, :1], cache=cache, attention_mask=REAL)
