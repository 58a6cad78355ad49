"""Generation: the cache changes nothing, a row in a batch is that row alone, a seed is a promise."""

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
def test_greedy_written_out(position: str) -> None:
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
def test_windows_caps_and_stretched_positions(name: str) -> None:
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


def test_seeds() -> None:
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


def test_training_flags_come_back_as_they_were() -> None:
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


def test_stop() -> None:
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
    # what stood in the prompt does not end the row
    assert len(generate(model, [pair], 5, seed=3, stop=[(*pair, 99)])[0]) == 5


def test_no_forward_runs_after_the_last_row_has_stopped() -> None:
    model = build()
    (row,) = generate(model, [[1]], 10, seed=0)
    calls = []
    model.norm.register_forward_hook(lambda *_: calls.append(1) and None)
    end = row.index(row[2]) + 1
    assert generate(model, [[1]], 10, seed=0, stop=(row[2],)) == [row[:end]]
    assert len(calls) == end


def test_a_tensor_of_prompts_and_nothing_to_do() -> None:
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
def test_only_candidates_are_drawn(seed: int, k: int | None, p: float | None, temperature: float) -> None:
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


def test_frequencies_are_the_probabilities() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    uniform = torch.rand(40_000)
    drawn = Counter(Sampling(0.5).choose(logits.expand(40_000, 4), uniform).tolist())
    for token, probability in enumerate((logits / 0.5).softmax(-1)[0].tolist()):
        assert drawn[token] / 40_000 == pytest.approx(probability, abs=0.01)


def test_extremes_of_sampling() -> None:
    logits = torch.tensor([[0.0, 5.0, -3.0], [9.0, 5.0, 9.5]])
    uniform = torch.tensor([0.999999, 0.3])
    assert Sampling(0.0).choose(logits, uniform).tolist() == [1, 2]
    for temperature in (1e-6, 1e-38, 1e-50):
        assert Sampling(temperature).choose(logits, uniform).tolist() == [1, 2]
    assert Sampling(5.0, top_k=1).choose(logits, uniform).tolist() == [1, 2]
    assert Sampling(5.0, top_p=1e-9).choose(logits, uniform).tolist() == [1, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    rows = generate(build().to(dtype), PROMPTS, 6, temperature=0.0)
    assert [len(row) for row in rows] == [6] * 4


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[1], []], {}, "prompt 1 is empty; give at least one token to start from"),
        ([[1] * 25], {}, "prompt 0 has 25 tokens, which with max_new_tokens=8 is more than max_seq_len=32; "
         "keep its last 24 tokens or ask for at most 7 new ones$"),
        ([[1] * 33], {}, "prompt 0 has 33 tokens, more than max_seq_len=32; keep its last 24 tokens$"),
        ([[1] * 9], {"max_new_tokens": 32}, "=32 is more than .*; ask for at most 23 new ones$"),
        ([[1] * 33], {"max_new_tokens": 32}, "=32; keep fewer of them and ask for fewer new ones$"),
        ([[1]], {"temperature": -1.0}, "temperature=-1.0: want 0"),
        ([[1]], {"temperature": "hot"}, "^temperature='hot': want 0"),
        ([[1]], {"top_k": 0}, "top_k=0: want a positive whole number"),
        ([[1]], {"top_k": True}, "^top_k=True: want a positive whole number"),
        ([[1]], {"top_p": 0.0}, r"top_p=0.0: want a probability in \(0, 1\]"),
        ([[1]], {"top_p": "0.9"}, r"^top_p='0.9': want a probability in \(0, 1\]"),
        ([[1]], {"max_new_tokens": -1}, "max_new_tokens=-1: want 0 or more"),
        ([[1]], {"seed": 2**63}, f"seed={2**63}: want a whole number of 64 bits, or None"),
        ([[1]], {"seed": 1.5}, "^seed=1.5: want a whole number of 64 bits, or None"),
        ([[1]], {"stop": [[]]}, "stop holds an empty sequence"),
        ([[17]], {}, "tokens"),
    ],
)  # fmt: skip
def test_refusals(prompts: list, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(build(), prompts, **{"max_new_tokens": 8, **options})


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        (["hello"], {}, r"prompts want one list of token ids each; got \['hello'\]; encode text"),
        ([1, 2], {}, r"prompts want one list of token ids each; got \[1, 2\]; encode text, nest one prompt"),
        ([[1.7]], {}, r"prompts want one list of token ids each; got \[\[1.7\]\]; encode text, nest one"),
        (torch.ones(1, 2), {}, r"prompts want one list of token ids each; got \[\[1.0, 1.0\]\]; encode text"),
        (None, {}, "^prompts want one list of token ids each; got None$"),
        ([[1]], {"max_new_tokens": 3.5}, "max_new_tokens=3.5: want a whole number"),
        ([[1]], {"max_new_tokens": True}, "^max_new_tokens=True: want a whole number"),
        ([[1]], {"stop": 3}, "stop wants token ids or sequences of them; got 3; put it in a list"),
        ([[1]], {"stop": "end"}, "stop wants token ids or sequences of them; got 'end'; encode text first"),
    ],
)
def test_wrong_types(prompts, options: dict, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        generate(build(), prompts, **{"max_new_tokens": 8, **options})


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (lambda: build(causal=False), ValueError, "causal Transformer; this one has config.causal=False"),
        (lambda: build(head="none", tie_embeddings=False), ValueError, "Transformer with a head"),
        (lambda: SimpleNamespace(config={}), TypeError, "Transformer of ffn; got a Simple.*; ffn.load"),
    ],
)  # fmt: skip
def test_a_model_that_cannot_continue_is_told_at_once(model, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^generate wants a {message}"):
        stream(model(), [1], 8)


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {}, {"top_k": 5}, {"top_p": 0.5}])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_refused(options: dict, bad: float) -> None:
    model = build()
    model.norm.weight.data.fill_(bad)
    with pytest.raises(ValueError, match=r"^the logits are not finite in float64: a weight is not, or"):
        generate(model, [[1]], 3, **options)


def test_a_temperature_beyond_float32_draws_what_is_possible() -> None:
    logits = torch.tensor([[0.0, -torch.inf, 1.0, -torch.inf]])
    for temperature in (1e39, float("inf")):
        drawn = {
            Sampling(temperature).choose(logits, torch.tensor([u])).item() for u in (0.0, 0.3, 0.7, 0.99)
        }
        assert drawn == {0, 2}
