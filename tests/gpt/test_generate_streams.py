"""Streams: the tokens of `generate` one by one, several per model, and changes between two tokens."""

import copy

import pytest
import torch

from ffn import pack, unpack
from ffn.gpt.generate import generate, stream
from tests.gpt.test_generate import PROMPTS, build


@pytest.mark.parametrize("cache", [True, False])
def test_a_stream_equals_generate(cache: bool) -> None:
    model = build()
    options = {"seed": 4, "temperature": 0.7, "top_k": 6, "top_p": 0.9, "cache": cache}
    (row,) = generate(model, [PROMPTS[0]], 20, **options)
    for stop, whole in (((), row), ((row[10],), row[: row.index(row[10]) + 1])):
        assert generate(model, [PROMPTS[0]], 20, stop=stop, **options) == [whole]
        assert list(stream(model, PROMPTS[0], 20, stop=stop, **options)) == whole
        assert list(stream(model, torch.tensor(PROMPTS[0]), 20, stop=stop, **options)) == whole


def test_a_stream_computes_a_token_when_it_is_asked_for() -> None:
    model = build(dropout=0.5)
    seen = []
    model.norm.register_forward_hook(lambda module, *_: seen.append(module.training))
    tokens = stream(model, [1, 2], 10, seed=0)
    for expected in (1, 2, 3):
        next(tokens)
        assert seen == [False] * expected
        assert not torch.is_inference_mode_enabled()
        assert torch.is_grad_enabled()
        assert all(module.training for module in model.modules())


def test_streams_of_one_model_do_not_disturb_each_other() -> None:
    model = build(dropout=0.5)
    want = [generate(model, [prompt], 10, seed=0)[0] for prompt in PROMPTS[:2]]
    first, second = (stream(model, prompt, 10, seed=0) for prompt in PROMPTS[:2])
    got = [next(first)], [next(second)]
    got[0].extend(first)
    assert generate(model, PROMPTS[:1], 10, seed=0) == want[:1]
    got[1].extend(second)
    assert [*got] == want
    assert all(module.training for module in model.modules())


@pytest.mark.usefixtures("small_is_worth_it")
@pytest.mark.parametrize("packs", [True, False])
def test_a_stream_uses_the_weights_of_the_moment(packs: bool) -> None:
    model = build(dropout=0.5).float()
    if packs:
        pack(model)
    tokens, row = stream(model, PROMPTS[0], 10, temperature=0.0), list(PROMPTS[0])
    row += [next(tokens), next(tokens)]
    with torch.no_grad():
        model.blocks[-1].feed_forward.up_proj.weight.neg_()  # after the keys and values in the cache
        model.blocks[-1].feed_forward.down_proj.weight.mul_(2.0)
    plain = unpack(copy.deepcopy(model)).eval()
    for token in tokens:
        assert token == plain(torch.tensor([row]))[0, -1].argmax()
        row.append(token)
    assert len(row) == len(PROMPTS[0]) + 10


def test_training_between_two_tokens_is_seen() -> None:
    model = build(dropout=0.5).eval()
    first = stream(model, PROMPTS[0], 10, seed=0)
    next(first)
    model.train()
    with torch.no_grad():
        model.embedding.weight.mul_(-1.0)
    fresh = build()
    fresh.load_state_dict(model.state_dict())
    assert generate(model, PROMPTS, 10, seed=0) == generate(fresh, PROMPTS, 10, seed=0)
    next(first)
    assert all(module.training for module in model.modules())
