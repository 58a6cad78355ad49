"""The three twins compute the same function of the same weights."""

import pytest
import torch

from benchmarks import twins
from benchmarks.twins import GENERATION, Shape, Twin

CPU = torch.device("cpu")
ERF, TANH = Shape(11, 16, 2, 2, 8, 2, "gelu"), Shape(40, 16, 2, 2, 24, 2, "gelu_tanh")


def twin(name: str, shape: Shape, dtype: torch.dtype = torch.float64) -> Twin:
    if name == "transformers":
        pytest.importorskip("transformers")
    return GENERATION[name](shape, 0.0, twins.draw(shape, CPU), dtype)


def test_cache_changes_no_token() -> None:
    model = twin("torch", TANH).model
    prompt = torch.randint(40, (3, 7))
    assert torch.equal(model.generate(prompt, 9), model.generate(prompt, 9, cache=False))


@pytest.mark.parametrize("shape", [ERF, TANH], ids=["erf", "tanh"])
@pytest.mark.parametrize("name", ["torch", "transformers", "ffn"])
def test_all_twins_compute_the_same(name: str, shape: Shape) -> None:
    tokens = torch.randint(shape.vocab_size, (2, 8))
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    plain, other = twin("torch", shape), twin(name, shape)
    assert other.parameters == plain.parameters
    for one in (plain, other):
        one.model.eval()
        one.loss(inputs, targets).backward()
    torch.testing.assert_close(other.logits(inputs), plain.logits(inputs), rtol=1e-11, atol=1e-11)
    # transformers computes its loss in float32
    torch.testing.assert_close(other.table.grad, plain.table.grad, rtol=1e-4, atol=1e-7)
    made = torch.as_tensor(other.generate(inputs[:, :3], 5))
    assert torch.equal(made, plain.generate(inputs[:, :3], 5))


def test_every_weight_is_copied() -> None:
    weights = twins.draw(TANH, CPU)
    assert not any((w == 0).any() or (w == 1).any() for w in weights.values())


def test_packing_changes_no_logits() -> None:
    wide = Shape(64, 256, 1, 2, 24, 2, "gelu_tanh")  # enough to pack
    plain, packed = (twin(name, wide, torch.float32) for name in ("torch", "ffn packed"))
    tokens = torch.randint(64, (2, 8))
    with torch.no_grad():
        torch.testing.assert_close(packed.logits(tokens), plain.logits(tokens), rtol=1e-4, atol=1e-5)
