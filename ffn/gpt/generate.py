"""Generation: tokens in, more tokens out; greedy or sampled, one prompt or many, whole or streamed."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from numbers import Integral, Real
from threading import RLock
from typing import SupportsIndex
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ffn.gpt.transformer import Transformer, TransformerConfig
from ffn.nn.attention import LayerCache
from ffn.packing.forwards import one_look
from ffn.packing.pack import pack_where_possible, unpack

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
    """Continue each prompt; the new tokens alone are returned, one list a prompt.

    Args:
        model: a causal Transformer; put in eval mode meanwhile, its training flags restored after.
        prompts: token lists of any lengths, or an integer tensor (B, T).
        max_new_tokens: how many at most; the longest prompt and they must fit config.max_seq_len.
        temperature: logits are divided by it; 0 is greedy, the most likely token each time.
        top_k: draw from the k most likely tokens only.
        top_p: draw from the fewest most likely tokens whose probability adds up to p.
        stop: token ids, or sequences of them, after which a row is finished; they are its last tokens.
        seed: row i draws from its own generator, seeded with seed + i, so that it gets what its prompt alone
            would get with that seed. None: different each time. torch's global generator is never used.
        cache: False computes every position again for every token: slow, and the oracle of the cache.

    Raises:
        ValueError, TypeError: no Transformer, a prompt that is empty or too long, an option out of range,
            logits that are not finite.

    >>> model = Transformer(TransformerConfig(vocab_size=65, dim=64, num_layers=2, num_heads=4))
    >>> [len(row) for row in generate(model, [[1, 2, 3], [4]], 10)]
    [10, 10]

    Sources: Fan et al. 2018 (top-k); Holtzman et al. 2020 (top-p).
    """
    sampling = Sampling(temperature, top_k, top_p)
    given = _read(prompts)
    rows: list[list[int]] = [[] for _ in given]
    steps = _continue(model, given, max_new_tokens, sampling, stop, seed, cache)
    with one_look(model):  # nobody else has a turn between the steps
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
    """The tokens of `generate(model, [prompt], ...)[0]`, each as soon as it is known.

    The arguments are checked at the call. The model is in eval mode from the first token until the iterator
    ends or is closed; of several at once, until the last of them does.
    """
    sampling = Sampling(temperature, top_k, top_p)
    steps = _continue(model, _read([prompt]), max_new_tokens, sampling, stop, seed, cache)
    return (token for (token,) in steps if token is not None)


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; see `generate` for the fields."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self):
        if not (isinstance(self.temperature, Real) and self.temperature >= 0.0):
            raise ValueError(f"temperature={self.temperature!r}: want 0 (greedy) or a positive number")
        if self.top_k is not None and not (_is_whole(self.top_k) and self.top_k > 0):
            raise ValueError(f"top_k={self.top_k!r}: want a positive whole number, or None")
        if self.top_p is not None and not (isinstance(self.top_p, Real) and 0.0 < self.top_p <= 1.0):
            raise ValueError(f"top_p={self.top_p!r}: want a probability in (0, 1], or None")

    def choose(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """Token ids (B) from logits (B, V), one uniform number in [0, 1) a row (B) deciding."""
        dtype, logits = logits.dtype, logits.float()
        likeliest = logits.argmax(-1, keepdim=True)  # a third of the time of `max` on the CPU
        largest = logits.gather(1, likeliest)
        greedy = self.temperature < torch.finfo(logits.dtype).tiny  # float32 would divide by 0
        chosen = likeliest.squeeze(1) if greedy else self._draw(logits - largest, uniform)
        if not all(map(math.isfinite, largest.flatten().tolist())):  # last, since a GPU is waited for
            raise ValueError(
                f"the logits are not finite in {str(dtype)[6:]}: a weight is not, or values overflow; "
                "look at the weights, or generate in a wider dtype"
            )
        return chosen

    def _draw(self, logits: Tensor, uniform: Tensor) -> Tensor:
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
        drawn.clamp_(max=logits.shape[-1] - 1)  # of NaN it is one more
        return (drawn if ids is None else ids.gather(1, drawn)).squeeze(1)


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _read(prompts) -> list:
    """The prompts as lists; TypeError where one is no list of token ids."""
    rule = "prompts want one list of token ids each"
    if not isinstance(prompts, Iterable):
        raise TypeError(f"{rule}; got {prompts!r}")
    rows = [row.tolist() if isinstance(row, Tensor) else row for row in prompts]
    if not all(isinstance(row, Sequence) and all(isinstance(t, SupportsIndex) for t in row) for row in rows):
        raise TypeError(f"{rule}; got {rows!r}; encode text, nest one prompt")
    return rows


def _continue(model: Transformer, rows, max_new_tokens: int, sampling: Sampling, stop: Stop, seed, cache):
    """Check the other arguments and return the iterator of `_steps`."""
    if not isinstance(getattr(model, "config", None), TransformerConfig):  # torch.compile's wrapper has it
        got = type(model).__name__
        raise TypeError(f"generate wants a Transformer of ffn; got a {got}; ffn.load reads one from a folder")
    if not isinstance(stop, Iterable):
        raise TypeError(f"stop wants token ids or sequences of them; got {stop!r}; put it in a list")
    endings = [tuple(s) if isinstance(s, Iterable) else (s,) for s in stop]
    if () in endings:
        raise ValueError("stop holds an empty sequence, which would end every row at once; leave it out")
    if not all(isinstance(token, Integral) for ending in endings for token in ending):
        raise TypeError(f"stop wants token ids or sequences of them; got {stop!r}; encode text first")
    if not model.config.causal:
        raise ValueError("generate wants a causal Transformer; this one has config.causal=False")
    if model.head is None:
        raise ValueError("generate wants a Transformer with a head; this one has config.head='none'")
    if seed is not None and not (_is_whole(seed) and -(2**63) <= seed < 2**63):
        raise ValueError(f"seed={seed!r}: want a whole number of 64 bits, or None")
    if not _is_whole(max_new_tokens):
        raise TypeError(f"max_new_tokens={max_new_tokens!r}: want a whole number")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens={max_new_tokens}: want 0 or more")
    for i, row in enumerate(rows):
        if not row:
            raise ValueError(f"prompt {i} is empty; give at least one token to start from")
        if len(row) + max_new_tokens > model.config.max_seq_len:
            raise ValueError(f"prompt {i} {_too_long(len(row), max_new_tokens, model.config.max_seq_len)}")
    return _steps(model, rows, max_new_tokens, sampling, endings, seed, cache)


def _too_long(tokens: int, max_new_tokens: int, window: int) -> str:
    """What is wrong with a prompt of so many tokens, and only such advice as can be followed."""
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
    endings,
    seed,
    cache: bool,
) -> Iterator[list[int | None]]:
    """One list a step: each row's new token, None once the row is finished."""
    draws = _draws(len(prompts), max_new_tokens, seed).to(model.embedding.weight.device)
    recent: list[tuple[int, ...]] = [()] * len(prompts)
    longest = max(map(len, endings), default=0)
    unfinished = [True] * len(prompts)
    with _decoding(model):
        sequences = _Sequences(model, prompts, max_new_tokens, cache)
        for step in range(max_new_tokens):
            if not any(unfinished):
                return
            chosen = sequences.extend(sampling, draws[step])
            yield [token if live else None for token, live in zip(chosen, unfinished, strict=True)]
            if endings:
                recent = [(*r, t)[-longest:] for r, t in zip(recent, chosen, strict=True)]
                ended = [any(r[-len(e) :] == e for e in endings) for r in recent]
                unfinished = [live and not end for live, end in zip(unfinished, ended, strict=True)]


@dataclass
class _Decoded:
    """What generation has changed in a model, to be undone when the last of its users leaves."""

    users: int = 0
    training: list[nn.Module] = field(default_factory=list)
    packed: list[nn.Module] = field(default_factory=list)


_decoded: WeakKeyDictionary[Transformer, _Decoded] = WeakKeyDictionary()
_lock = RLock()  # streams may run in threads, and one may be closed by the collector at any time


@contextmanager
def _decoding(model: Transformer):
    """Eval mode, and on the CPU packed weights, for as long as anybody wants tokens of the model."""
    with _lock:
        decoded = _decoded.setdefault(model, _Decoded())
        decoded.users += 1
    try:
        with _lock:
            decoded.training += [module for module in model.modules() if module.training]
            model.eval()
            decoded.packed += pack_where_possible(model)
        yield
    finally:
        with _lock:
            decoded.users -= 1
            if decoded.users == 0:
                del _decoded[model]
                for module in decoded.packed:
                    unpack(module)
                for module in decoded.training:
                    module.training = True


class _Sequences:
    """The rows so far, padded on the left so that they all grow at the same column."""

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
        """Choose one more token a row, and take it in."""
        start = self.cache[0].length if self.cache else 0
        real = None if self.real is None else self.real[:, : self.length]
        hidden = self.model.hidden(self.tokens[:, start : self.length], cache=self.cache, attention_mask=real)
        chosen = sampling.choose(self.model.logits(hidden[:, -1]), uniform)
        self.tokens[:, self.length] = chosen
        self.length += 1
        return chosen.tolist()


def _draws(rows: int, steps: int, seed: int | None) -> Tensor:
    """Uniform numbers in [0, 1), (steps, rows), on the CPU so that a seed means the same on every device."""
    generators = [torch.Generator() for _ in range(rows)]
    for i, generator in enumerate(generators):
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(int(seed) + i)
    draws = [torch.rand(steps, 1, generator=generator) for generator in generators]
    return torch.cat(draws, 1) if draws else torch.empty(steps, 0)
