"""Generation: the cache changes nothing, a row equals itself in a batch, a seed decides the tokens."""

import dataclasses
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ffn.gpt.generate import Sampling, generate, stream
from ffn.gpt.transformer import Transformer, TransformerConfig
from tests.models import VARIANTS

F64 = torch.float64
CONFIG = TransformerConfig(vocab_size=17, dim=16, num_layers=2, num_heads=4, num_kv_heads=2, max_seq_len=32)
POSITIONS = pytest.mark.parametrize("position", ["rotary", "learned", "none"])
PROMPTS = [[1, 2, 3, 4, 5], [6], [7, 8, 9], [10, 11, 12, 13, 14]]


def build(**options) -> Transformer:
    torch.manual_seed(1)
    model = Transformer(dataclasses.replace(CONFIG, **options), dtype=F64)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(1.0 if p.ndim == 1 else 0.0, 0.5)
    return model


@POSITIONS
def test_greedy_equals_a_loop_over_the_model(position: str) -> None:
    model = build(position=position).eval()
    row = list(PROMPTS[0])
    for _ in range(8):
        row.append(int(model(torch.tensor([row]))[0, -1].argmax()))
    assert generate(model, [PROMPTS[0]], 8, temperature=0.0) == [row[5:]]


@POSITIONS
@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"seed": 3}], ids=["greedy", "sampled"])
def test_the_cache_changes_nothing(position: str, options: dict) -> None:
    model = build(position=position)
    cached = generate(model, PROMPTS, 12, **options)
    assert cached == generate(model, PROMPTS, 12, cache=False, **options)


@pytest.mark.parametrize("name", ["gemma2", "neox", "olmo2"])
def test_the_cache_changes_nothing_in_any_architecture(name: str) -> None:
    model = build(**VARIANTS[name])
    cached = generate(model, PROMPTS, 12, temperature=0.0)
    assert cached == generate(model, PROMPTS, 12, temperature=0.0, cache=False)
    assert cached == [generate(model, [prompt], 12, temperature=0.0)[0] for prompt in PROMPTS]


@POSITIONS
def test_a_row_of_a_batch_is_that_row_alone(position: str) -> None:
    model = build(position=position)
    assert generate(model, PROMPTS, 9, temperature=0.0) == [
        generate(model, [prompt], 9, temperature=0.0)[0] for prompt in PROMPTS
    ]
    assert generate(model, PROMPTS, 9, seed=5, top_k=6) == [
        generate(model, [prompt], 9, seed=5 + i, top_k=6)[0] for i, prompt in enumerate(PROMPTS)
    ]


def test_a_seed_decides_the_tokens() -> None:
    model = build()
    state = torch.get_rng_state()
    first = generate(model, PROMPTS, 20, seed=1)
    assert generate(model, PROMPTS, 20, seed=1) == first
    assert generate(model, PROMPTS, np.int64(20), seed=np.int64(1), top_k=np.int64(17)) == first
    assert generate(model, PROMPTS, 20, seed=11) != first
    assert generate(model, PROMPTS, 20) != generate(model, PROMPTS, 20)
    assert torch.equal(torch.get_rng_state(), state)
    same = generate(model, [[1, 2]] * 3, 20, seed=1)
    assert len({tuple(row) for row in same}) == 3


def test_training_flags_are_restored() -> None:
    model = build(dropout=0.5)
    model.blocks[0].eval()
    flags = [module.training for module in model.modules()]
    deterministic = generate(model, PROMPTS, 5, temperature=0.0)
    assert [module.training for module in model.modules()] == flags
    assert deterministic == generate(model.eval(), PROMPTS, 5, temperature=0.0)
    model.train()
    with pytest.raises(ValueError, match="tokens"):
        generate(model, [[99]], 5)
    assert all(module.training for module in model.modules())


def test_a_stop_ends_its_row() -> None:
    model = build()
    whole = generate(model, PROMPTS, 20, seed=2)
    ended = generate(model, PROMPTS, 20, seed=2, stop=(whole[0][4],))
    for row, full in zip(ended, whole, strict=True):
        end = full.index(whole[0][4]) + 1 if whole[0][4] in full else 20
        assert row == full[:end]
    pair = whole[1][6:8]
    (row,) = generate(model, [PROMPTS[1]], 20, seed=3, stop=[pair, [99, 98, 97]])
    full = whole[1]
    end = next(i for i in range(20) if full[i : i + 2] == pair) + 2
    assert row == full[:end]
    # a stop within the prompt does not end the row
    assert len(generate(model, [pair], 5, seed=3, stop=[(*pair, 99)])[0]) == 5


def test_no_forward_runs_after_the_last_row_has_stopped() -> None:
    model = build()
    (row,) = generate(model, [[1]], 10, seed=0)
    calls = []
    model.norm.register_forward_hook(lambda *_: calls.append(1) and None)
    end = row.index(row[2]) + 1
    assert generate(model, [[1]], 10, seed=0, stop=(row[2],)) == [row[:end]]
    assert len(calls) == end


def test_prompts_may_be_a_tensor_an_iterator_or_empty() -> None:
    model = build()
    want = generate(model, PROMPTS[:1], 3, seed=0)
    assert generate(model, torch.tensor(PROMPTS[:1] * 2), 3, seed=0)[:1] == want
    assert generate(model, iter(PROMPTS[:1]), 3, seed=0) == want
    assert generate(model, PROMPTS, 0) == [[], [], [], []]
    assert generate(model, [], 5) == []


def test_the_window_can_be_filled_exactly() -> None:
    model = build()
    assert [len(row) for row in generate(model, [[1] * 30, [2]], 2, seed=0)] == [2, 2]


@given(
    seed=st.integers(0, 100),
    k=st.none() | st.integers(1, 20),
    p=st.none() | st.floats(0.05, 1.0),
    temperature=st.floats(0.3, 3.0),
)
def test_only_the_top_tokens_are_sampled(
    seed: int, k: int | None, p: float | None, temperature: float
) -> None:
    torch.manual_seed(seed)
    logits = torch.randn(1, 12) * 3
    probabilities, order = (logits / temperature).softmax(-1)[0].sort(descending=True)
    count = most = min(k or 12, 12)
    if p is not None:
        kept = probabilities[:count] / probabilities[:count].sum()
        count, most = (int((kept.cumsum(0) - kept < p + error).sum()) for error in (-1e-6, 1e-6))
    sampling = Sampling(temperature, k, p)
    drawn = {int(sampling.choose(logits, torch.tensor([u]))) for u in torch.linspace(0, 1 - 2**-24, 301)}
    assert drawn <= set(order[:most].tolist())
    assert int(sampling.choose(logits, torch.tensor([0.0]))) in drawn
    assert drawn >= set(order[:count][probabilities[:count] > 0.02].tolist())


def test_tokens_are_sampled_by_their_probabilities() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    uniform = torch.rand(40_000)
    drawn = Counter(Sampling(0.5).choose(logits.expand(40_000, 4), uniform).tolist())
    for token, probability in enumerate((logits / 0.5).softmax(-1)[0].tolist()):
        assert drawn[token] / 40_000 == pytest.approx(probability, abs=0.01)


def test_extreme_options_choose_the_most_likely_token() -> None:
    logits = torch.tensor([[0.0, 5.0, -3.0], [9.0, 5.0, 9.5]])
    uniform = torch.tensor([0.999999, 0.3])
    assert Sampling(0.0).choose(logits, uniform).tolist() == [1, 2]
    for temperature in (1e-6, 1e-38, 1e-50):
        assert Sampling(temperature).choose(logits, uniform).tolist() == [1, 2]
    assert Sampling(5.0, top_k=1).choose(logits, uniform).tolist() == [1, 2]
    assert Sampling(5.0, top_p=1e-9).choose(logits, uniform).tolist() == [1, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generates_in_every_dtype(dtype: torch.dtype) -> None:
    rows = generate(build().to(dtype), PROMPTS, 6, temperature=0.0)
    assert [len(row) for row in rows] == [6] * 4


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[1], []], {}, "prompt 1 is empty"),
        (
            [[1] * 25],
            {},
            "prompt 0 has 25 tokens, .*; keep its last 24 tokens or ask for at most 7 new ones$",
        ),
        ([[1] * 33], {}, "prompt 0 has 33 tokens, .*; keep its last 24 tokens$"),
        ([[1] * 9], {"max_new_tokens": 32}, "prompt 0 has 9 tokens, .*; ask for at most 23 new ones$"),
        ([[1] * 33], {"max_new_tokens": 32}, "prompt 0 .*; keep fewer of them and ask for fewer new ones$"),
        ([[1]], {"temperature": -1.0}, "temperature"),
        ([[1]], {"temperature": "hot"}, "temperature"),
        ([[1]], {"top_k": 0}, "top_k"),
        ([[1]], {"top_k": True}, "top_k"),
        ([[1]], {"top_p": 0.0}, "top_p"),
        ([[1]], {"top_p": "0.9"}, "top_p"),
        ([[1]], {"max_new_tokens": -1}, "max_new_tokens"),
        ([[1]], {"seed": 2**63}, "seed"),
        ([[1]], {"seed": 1.5}, "seed"),
        ([[1]], {"stop": [[]]}, "stop"),
        ([[17]], {}, "tokens"),
    ],
)
def test_values_out_of_range_are_refused(prompts: list, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        generate(build(), prompts, **{"max_new_tokens": 8, **options})


@pytest.mark.parametrize(
    ("prompts", "options", "name"),
    [
        (["hello"], {}, "prompts"),
        ([1, 2], {}, "prompts"),
        ([[1.7]], {}, "prompts"),
        (torch.ones(1, 2), {}, "prompts"),
        (None, {}, "prompts"),
        ([[1]], {"max_new_tokens": 3.5}, "max_new_tokens"),
        ([[1]], {"max_new_tokens": True}, "max_new_tokens"),
        ([[1]], {"stop": 3}, "stop"),
        ([[1]], {"stop": "end"}, "stop"),
    ],
)
def test_wrong_types_are_refused(prompts, options: dict, name: str) -> None:
    with pytest.raises(TypeError, match=f"^{name}"):
        generate(build(), prompts, **{"max_new_tokens": 8, **options})


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (lambda: build(causal=False), ValueError, "must be causal"),
        (lambda: build(head="none", tie_embeddings=False), ValueError, "must have a head"),
        (lambda: SimpleNamespace(config={}), TypeError, "must be a Transformer"),
    ],
)
def test_a_model_that_cannot_generate_is_refused_at_the_call(model, error: type[Exception], message) -> None:
    with pytest.raises(error, match=f"^model {message}"):
        stream(model(), [1], 8)


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {}, {"top_k": 5}, {"top_p": 0.5}])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_refused(options: dict, bad: float) -> None:
    model = build()
    model.norm.weight.data.fill_(bad)
    with pytest.raises(ValueError, match=r"^model must give finite logits"):
        generate(model, [[1]], 3, **options)


def test_a_temperature_beyond_float32_samples_possible_tokens() -> None:
    logits = torch.tensor([[0.0, -torch.inf, 1.0, -torch.inf]])
    for temperature in (1e39, float("inf")):
        drawn = {
            Sampling(temperature).choose(logits, torch.tensor([u])).item() for u in (0.0, 0.3, 0.7, 0.99)
        }
        assert drawn == {0, 2}
