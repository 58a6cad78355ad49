"""Streams: the tokens of `generate` one by one, several over one model, what happens between two tokens."""

import pytest
import torch

from ffn.gpt.generate import generate, stream
from ffn.packing import pack as packing
from tests.gpt.test_generate import PROMPTS, build


@pytest.mark.parametrize("cache", [True, False])
def test_stream_is_generate(cache: bool) -> None:
    model = build()
    options = {"seed": 4, "temperature": 0.7, "top_k": 6, "top_p": 0.9, "cache": cache}
    (row,) = generate(model, [PROMPTS[0]], 20, **options)
    for stop, whole in (((), row), ((row[10],), row[: row.index(row[10]) + 1])):
        assert generate(model, [PROMPTS[0]], 20, stop=stop, **options) == [whole]
        assert list(stream(model, PROMPTS[0], 20, stop=stop, **options)) == whole
        assert list(stream(model, torch.tensor(PROMPTS[0]), 20, stop=stop, **options)) == whole


def test_stream_yields_as_it_goes_and_leaves_no_mode_behind() -> None:
    model = build()
    seen = []
    model.norm.register_forward_hook(lambda *_: seen.append(1) and None)
    tokens = stream(model, [1, 2], 10, seed=0)
    assert model.training
    for expected in (1, 2, 3):
        next(tokens)
        assert len(seen) == expected
        assert not torch.is_inference_mode_enabled()
        assert torch.is_grad_enabled()
    tokens.close()
    assert model.training


@pytest.mark.parametrize("closed", [True, False])
def test_streams_share_a_model(monkeypatch: pytest.MonkeyPatch, closed: bool) -> None:
    monkeypatch.setattr(packing, "WORTH_PACKING", 0)
    model = build(dropout=0.5)
    want = [generate(model, [prompt], 10, seed=0)[0] for prompt in PROMPTS[:2]]
    assert "forward" not in model.head.__dict__
    first, second = (stream(model, prompt, 10, seed=0) for prompt in PROMPTS[:2])
    got = [next(first)], [next(second)]
    if closed:
        first.close()
    else:
        got[0].extend(first)
        assert got[0] == want[0]
    assert not any(module.training for module in model.modules())
    assert "forward" in model.head.__dict__
    assert generate(model, PROMPTS[:1], 10, seed=0) == want[:1]
    got[1].extend(second)
    assert got[1] == want[1]
    assert all(module.training for module in model.modules())
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_weights_change_between_two_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "WORTH_PACKING", 0)
    model = build(dropout=0.5).float()
    tokens, row = stream(model, PROMPTS[0], 10, temperature=0.0), list(PROMPTS[0])
    row += [next(tokens), next(tokens)]
    with torch.no_grad():
        model.blocks[-1].feed_forward.up_proj.weight.neg_()  # behind the keys and values in the cache
        model.blocks[-1].feed_forward.down_proj.weight.mul_(2.0)
    for token in tokens:  # differentiated, so that nothing is packed
        assert token == model(torch.tensor([row]))[0, -1].argmax()
        row.append(token)
    assert len(row) == len(PROMPTS[0]) + 10


def test_training_between_two_streams() -> None:
    model = build(dropout=0.5)
    first = stream(model, PROMPTS[0], 10, seed=0)
    next(first)
    model.train()
    with torch.no_grad():
        model.embedding.weight.mul_(-1.0)
    fresh = build()
    fresh.load_state_dict(model.state_dict())
    assert generate(model, PROMPTS, 10, seed=0) == generate(fresh, PROMPTS, 10, seed=0)
    first.close()
    assert all(module.training for module in model.modules())
