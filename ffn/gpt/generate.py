"""Generation: continue prompts token by token, greedy or sampled, one or many, at once or streamed."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import SupportsIndex

import torch
from torch import Tensor

from ffn.gpt.transformer import Transformer, TransformerConfig
from ffn.nn.attention import LayerCache
from ffn.nn.eval_mode import eval_mode

Stop = Iterable[int | Sequence[int]]


def generate(
    model: Transformer,
    prompts: Iterable[Sequence[int]] | Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: Stop = (),
    seed: int | None = None,
    cache: bool = True,
) -> list[list[int]]:
    """Continue each prompt, and return the new tokens only, one list per prompt.

    On the CPU, `ffn.pack(model)` beforehand makes it faster.

    Args:
        model: a causal Transformer. It runs in eval mode; its training flags are restored. Threads may share
            a model that is in eval mode already.
        prompts: lists of token ids of any lengths, or an integer tensor (B, T).
        max_new_tokens: the limit per prompt; the longest prompt plus this must fit config.max_seq_len.
        temperature: divides the logits; 0 is greedy: the most likely token each time.
        top_k: sample from the k most likely tokens only.
        top_p: sample from the fewest most likely tokens with probabilities that add up to p.
        stop: token ids, or sequences of token ids, that end a row; they are its last tokens.
        seed: row i samples from its own generator, seeded with seed + i, so that it gets the same tokens as
            its prompt alone with that seed. None: different each time. torch's global generator is not used.
        cache: False recomputes every position for every token: slow, and the reference for the cache.

    Raises:
        ValueError, TypeError: model is not a causal Transformer with a head, a prompt is empty or too long,
            an option is out of range, or the logits are not finite.

    >>> model = Transformer(TransformerConfig(vocab_size=65, dim=64, num_layers=2, num_heads=4))
    >>> [len(row) for row in generate(model, [[1, 2, 3], [4]], 10)]
    [10, 10]

    Sources: Fan et al. 2018 (top-k); Holtzman et al. 2020 (top-p).
    """
    sampling = Sampling(temperature, top_k, top_p)
    given = _token_lists(prompts)
    rows: list[list[int]] = [[] for _ in given]
    steps = _start(model, given, max_new_tokens, sampling, stop, seed, cache)
    with eval_mode(model):
        for tokens in steps:
            for row, token in zip(rows, tokens, strict=True):
                if token is not None:
                    row.append(token)
    return rows


def stream(
    model: Transformer,
    prompt: Sequence[int] | Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: Stop = (),
    seed: int | None = None,
    cache: bool = True,
) -> Iterator[int]:
    """Yield the tokens of `generate(model, [prompt], ...)[0]`, each as soon as it is chosen.

    The arguments are checked at the call. The model is in eval mode only while a token is computed.
    """
    sampling = Sampling(temperature, top_k, top_p)
    steps = _start(model, _token_lists([prompt]), max_new_tokens, sampling, stop, seed, cache)
    return _one_by_one(model, steps)


def _one_by_one(model: Transformer, steps: Iterator[list[int | None]]) -> Iterator[int]:
    while True:
        with eval_mode(model):
            (token,) = next(steps, [None])
        if token is None:
            return
        yield token


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; see `generate` for the fields."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self):
        if not (isinstance(self.temperature, Real) and self.temperature >= 0.0):
            raise ValueError(f"temperature must be 0 (greedy) or a positive number, got {self.temperature!r}")
        if self.top_k is not None and not (_is_whole(self.top_k) and self.top_k > 0):
            raise ValueError(f"top_k must be a positive integer or None, got {self.top_k!r}")
        if self.top_p is not None and not (isinstance(self.top_p, Real) and 0.0 < self.top_p <= 1.0):
            raise ValueError(f"top_p must be a probability in (0, 1] or None, got {self.top_p!r}")

    def choose(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """Return token ids (B) for logits (B, V), decided by one uniform number in [0, 1) per row (B)."""
        dtype, logits = logits.dtype, logits.float()
        likeliest = logits.argmax(-1, keepdim=True)  # a third of the time of `max` on the CPU
        largest = logits.gather(1, likeliest)
        greedy = self.temperature < torch.finfo(logits.dtype).tiny  # float32 would divide by 0
        chosen = likeliest.squeeze(1) if greedy else self._sample(logits - largest, uniform)
        if not all(map(math.isfinite, largest.flatten().tolist())):  # last, since it waits for a GPU
            raise ValueError(
                f"model must give finite logits, got others in {dtype}: a weight is not finite, "
                "or values overflow; look at the weights, or generate in a wider dtype"
            )
        return chosen

    def _sample(self, logits: Tensor, uniform: Tensor) -> Tensor:
        logits, ids = logits / min(float(self.temperature), torch.finfo(logits.dtype).max), None
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            logits, ids = logits.topk(self.top_k)
        elif self.top_p is not None:
            logits, ids = logits.sort(descending=True)
        probabilities = logits.softmax(-1)
        if self.top_p is not None:
            before = probabilities.cumsum(-1) - probabilities
            probabilities = probabilities.masked_fill(before >= self.top_p, 0.0)
        cumulative = probabilities.cumsum(-1)
        drawn = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)
        drawn.clamp_(max=logits.shape[-1] - 1)  # with NaN it is one more
        return (drawn if ids is None else ids.gather(1, drawn)).squeeze(1)


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _token_lists(prompts) -> list:
    """Return the prompts as lists; TypeError where one is not a list of token ids."""
    rule = "prompts must be lists of token ids, one per prompt"
    if not isinstance(prompts, Iterable):
        raise TypeError(f"{rule}, got {prompts!r}")
    rows = [row.tolist() if isinstance(row, Tensor) else row for row in prompts]
    if not all(isinstance(row, Sequence) and all(isinstance(t, SupportsIndex) for t in row) for row in rows):
        raise TypeError(f"{rule}, got {rows!r}; encode text, and put a single prompt into a list")
    return rows


def _start(model: Transformer, rows, max_new_tokens: int, sampling: Sampling, stop: Stop, seed, cache):
    """Check the other arguments and return the iterator of `_steps`."""
    if not isinstance(getattr(model, "config", None), TransformerConfig):  # torch.compile's wrapper has one
        got = type(model).__name__
        raise TypeError(f"model must be a Transformer of ffn, got a {got}; ffn.load reads one from a folder")
    if not model.config.causal:
        raise ValueError("model must be causal, got a Transformer with config.causal=False")
    if model.head is None:
        raise ValueError("model must have a head, got a Transformer with config.head='none'")
    endings = _endings(stop)
    if seed is not None and not (_is_whole(seed) and -(2**63) <= seed < 2**63):
        raise ValueError(f"seed must be an integer of 64 bits or None, got {seed!r}")
    if not _is_whole(max_new_tokens):
        raise TypeError(f"max_new_tokens must be an integer, got {max_new_tokens!r}")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be 0 or more, got {max_new_tokens}")
    for i, row in enumerate(rows):
        if not row:
            raise ValueError(f"prompt {i} is empty; give at least one token to start from")
        if len(row) + max_new_tokens > model.config.max_seq_len:
            raise ValueError(f"prompt {i} {_too_long(len(row), max_new_tokens, model.config.max_seq_len)}")
    return _steps(model, rows, max_new_tokens, sampling, endings, seed, cache)


def _endings(stop: Stop) -> list[tuple[int, ...]]:
    rule = "stop must be a list of token ids or of sequences of them"
    if not isinstance(stop, Iterable):
        raise TypeError(f"{rule}, got {stop!r}; put it in a list")
    endings = [tuple(s) if isinstance(s, Iterable) else (s,) for s in stop]
    if () in endings:
        raise ValueError(f"{rule}, got an empty sequence, which would end every row at once; leave it out")
    if not all(isinstance(token, Integral) for ending in endings for token in ending):
        raise TypeError(f"{rule}, got {stop!r}; encode text first")
    return endings


def _too_long(tokens: int, max_new_tokens: int, window: int) -> str:
    """Return what is wrong with a prompt of so many tokens, with only such advice as can be followed."""
    with_new = "" if tokens > window else f", which with max_new_tokens={max_new_tokens} is"
    advice = []
    if max_new_tokens < window:
        advice.append(f"keep its last {window - max_new_tokens} tokens")
    if tokens < window:
        advice.append(f"ask for at most {window - tokens} new ones")
    remedy = " or ".join(advice) or "keep fewer of them and ask for fewer new ones"
    return f"has {tokens} tokens{with_new or ','} more than max_seq_len={window}; {remedy}"


def _steps(
    model: Transformer,
    prompts: list[list[int]],
    max_new_tokens: int,
    sampling: Sampling,
    endings: list[tuple[int, ...]],
    seed: int | None,
    cache: bool,
) -> Iterator[list[int | None]]:
    """Yield one list per step: the new token of each row, None once the row is finished."""
    uniform = _uniform(len(prompts), max_new_tokens, seed).to(model.embedding.weight.device)
    recent: list[tuple[int, ...]] = [()] * len(prompts)
    longest = max(map(len, endings), default=0)
    unfinished = [True] * len(prompts)
    sequences = _Sequences(model, prompts, max_new_tokens, cache)
    for step in range(max_new_tokens):
        if not any(unfinished):
            return
        chosen = sequences.extend(sampling, uniform[step])
        yield [token if live else None for token, live in zip(chosen, unfinished, strict=True)]
        if endings:
            recent = [(*r, t)[-longest:] for r, t in zip(recent, chosen, strict=True)]
            ended = [any(r[-len(e) :] == e for e in endings) for r in recent]
            unfinished = [live and not end for live, end in zip(unfinished, ended, strict=True)]


class _Sequences:
    """The rows so far, padded on the left so that all grow at the same column."""

    def __init__(self, model: Transformer, prompts: list[list[int]], max_new_tokens: int, cache: bool):
        self.model = model
        device = model.embedding.weight.device
        lengths = [len(row) for row in prompts]
        self.length = max(lengths, default=0)
        total = self.length + max_new_tokens
        self.tokens = torch.zeros(len(prompts), total, dtype=torch.int64, device=device)
        self.real: Tensor | None = None
        for i, row in enumerate(prompts):
            self.tokens[i, self.length - len(row) : self.length] = torch.tensor(row, device=device)
        if any(n < self.length for n in lengths):
            columns = torch.arange(total, device=device)
            self.real = columns >= self.length - torch.tensor(lengths, device=device)[:, None]
        self.cache = [LayerCache(total) for _ in model.blocks] if cache else None

    @torch.inference_mode()
    def extend(self, sampling: Sampling, uniform: Tensor) -> list[int]:
        """Choose one more token per row, append it to the row, and return the new tokens."""
        start = self.cache[0].length if self.cache else 0
        real = None if self.real is None else self.real[:, : self.length]
        hidden = self.model.hidden(self.tokens[:, start : self.length], cache=self.cache, attention_mask=real)
        chosen = sampling.choose(self.model.logits(hidden[:, -1]), uniform)
        self.tokens[:, self.length] = chosen
        self.length += 1
        return chosen.tolist()


def _uniform(rows: int, steps: int, seed: int | None) -> Tensor:
    """Return uniform numbers in [0, 1), (steps, rows), drawn on the CPU so that devices agree on a seed."""
    generators = [torch.Generator() for _ in range(rows)]
    for i, generator in enumerate(generators):
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(int(seed) + i)
    draws = [torch.rand(steps, 1, generator=generator) for generator in generators]
    return torch.cat(draws, 1) if draws else torch.empty(steps, 0)
