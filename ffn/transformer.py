"""The sentence as code: tokens -> Embedding -> Block x L -> Norm -> Head -> loss; decoder or encoder."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import torch
from torch import Tensor, nn

from ffn import activations
from ffn.config import from_dict, from_toml, to_toml
from ffn.nn.attention import Attention, LayerCache, check_heads, padding_mask
from ffn.nn.block import Block
from ffn.nn.embedding import Embedding, rotary_tables
from ffn.nn.feed_forward import FeedForward, gated_hidden_dim
from ffn.nn.head import Head
from ffn.nn.init import check_init, init_linear
from ffn.nn.norm import build_norm
from ffn.ops.feed_forward import check_options


@dataclass(frozen=True)
class TransformerConfig:
    """The sizes and choices that make a Transformer; checked when built, written to TOML and back.

    Sizes left out (None) follow from the others; `kv_heads`, `head_channels` and `hidden_width` hold them.

    Raises:
        ValueError: values that do not fit, alone or together.
    """

    vocab_size: int
    dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int | None = None  # num_heads
    head_dim: int | None = None  # dim / num_heads
    hidden_dim: int | None = None  # 4 dim, or gated_hidden_dim(dim) when gated
    max_seq_len: int = 1024
    activation: str = "swiglu"
    bias: bool = False  # of the feed-forward's and the attention output's Linears
    attention_bias: bool = False  # of the queries', keys' and values' Linears
    qk_norm: bool = False  # an RMSNorm over the channels of each query and key head
    position: Literal["rotary", "learned", "none"] = "rotary"
    rope_base: float = 10_000.0
    rope_scaling: float = 1.0  # positions are divided by it
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    norm_eps: float = 1e-5
    norm_position: Literal["pre", "post"] = "pre"
    parallel: bool = False  # attention and feed-forward read the same input
    causal: bool = True
    tie_embeddings: bool = True
    dropout: float = 0.0  # after the embedding, the attention and the feed-forward
    ffn_dropout: float = 0.0  # after the activation
    attention_dropout: float = 0.0  # on the attention weights
    save: Literal["preact", "input"] = "preact"  # what the feed-forward keeps for backward
    chunk_tokens: int | None = None  # with save="input"
    init: str = "gpt2"

    def __post_init__(self):
        sizes = ("vocab_size", "dim", "num_layers", "num_heads", "num_kv_heads", "head_dim", "hidden_dim")
        for name in (*sizes, "max_seq_len", "chunk_tokens", "rope_base", "rope_scaling", "norm_eps"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value}: want a positive number")
        for name in ("dropout", "ffn_dropout", "attention_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name}={getattr(self, name)}: want a probability in [0, 1)")
        for field in fields(self):
            choices, value = get_args(field.type), getattr(self, field.name)
            if get_origin(field.type) is Literal and value not in choices:
                raise ValueError(f"{field.name}={value!r}: want one of {', '.join(choices)}")
        check_options(activations.resolve(self.activation), 0.0, self.save, self.chunk_tokens, "auto")
        check_init(self.init)
        check_heads(self.dim, self.num_heads, self.num_kv_heads, self.head_dim)
        if self.position == "rotary" and self.head_channels % 2:
            raise ValueError(
                f"position='rotary' turns pairs of channels, but head_dim={self.head_channels} is odd; "
                "choose an even head_dim or another position"
            )

    @property
    def kv_heads(self) -> int:
        """G: num_kv_heads, or as many as there are query heads."""
        return self.num_kv_heads or self.num_heads

    @property
    def head_channels(self) -> int:
        """C: head_dim, or dim / num_heads."""
        return self.head_dim or self.dim // self.num_heads

    @property
    def hidden_width(self) -> int:
        """H: hidden_dim, or the feed-forward's own choice for dim."""
        gated = activations.resolve(self.activation).gated
        return self.hidden_dim or (gated_hidden_dim(self.dim) if gated else 4 * self.dim)

    def to_toml(self) -> str:
        """One `key = value` line a field."""
        return to_toml(self)

    @classmethod
    def from_toml(cls, text: str) -> "TransformerConfig":
        """Read `to_toml`'s text, or any part of it: what is left out has its default."""
        return from_toml(cls, text)

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any], prefix: str = "model") -> "TransformerConfig":
        """Build from a mapping; an unknown key is refused with the nearest one: `model.n_layer: no such key;
        did you mean model.num_layers?`."""
        return from_dict(cls, mapping, prefix)


def build_block(c: TransformerConfig, *, device=None, dtype=None) -> Block:
    """One layer of a Transformer with this config."""
    factory: dict[str, Any] = {"device": device, "dtype": dtype}
    attention = Attention(
        c.dim,
        c.num_heads,
        c.num_kv_heads,
        c.head_dim,
        causal=c.causal,
        dropout=c.attention_dropout,
        out_dropout=c.dropout,
        qkv_bias=c.attention_bias,
        out_bias=c.bias,
        qk_norm=partial(build_norm, "rmsnorm", eps=c.norm_eps, **factory) if c.qk_norm else None,
        **factory,
    )
    feed_forward = FeedForward(
        c.dim,
        c.hidden_width,
        c.ffn_dropout,
        activation=c.activation,
        bias=c.bias,
        out_dropout=c.dropout,
        save=c.save,
        chunk_tokens=c.chunk_tokens,
        init=c.init,
        **factory,
    )
    norm = partial(build_norm, c.norm, c.dim, c.norm_eps, **factory)
    return Block(attention, feed_forward, norm, norm_position=c.norm_position, parallel=c.parallel)


class Transformer(nn.Module):
    """A decoder (causal) or an encoder: `embedding`, `blocks`, `norm` (absent with post-norm) and `head`.

    Under bfloat16 autocast the products run in bfloat16, the norms and the residual stream in float32.

    Args:
        config: see TransformerConfig.
        device, dtype: of the weights. On "meta" nothing is allocated: follow with `to_empty(device=...)` and
            `init_weights()` or `load_state_dict(...)`.

    >>> config = TransformerConfig(vocab_size=65, dim=64, num_layers=2, num_heads=4)
    >>> Transformer(config)(torch.zeros(1, 7, dtype=torch.int64)).shape
    torch.Size([1, 7, 65])
    """

    origin: dict[str, Any] | None = None  # of a model from elsewhere: its model_type, its special tokens

    def __init__(self, config: TransformerConfig, *, device=None, dtype=None):
        super().__init__()
        self.config = config
        meta: dict[str, Any] = {"device": "meta", "dtype": dtype}  # init_weights draws each weight once
        learned = config.max_seq_len if config.position == "learned" else None
        self.embedding = Embedding(config.vocab_size, config.dim, learned, dropout=config.dropout, **meta)
        self.blocks = nn.ModuleList(build_block(config, **meta) for _ in range(config.num_layers))
        post = config.norm_position == "post"  # there each block ends in its own norm
        self.norm = nn.Identity() if post else build_norm(config.norm, config.dim, config.norm_eps, **meta)
        self.head = Head(config.dim, config.vocab_size, tied=config.tie_embeddings, **meta)
        device = torch.get_default_device() if device is None else torch.device(device)
        if device.type != "meta":
            self.to_empty(device=device)
            self.init_weights()

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draw every weight anew: the tables normal 0.02, the norms 1, the Linears of the blocks as
        `config.init` says (see `ffn.nn.init`); on the meta device nothing happens."""
        if self.embedding.weight.is_meta:
            return
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                module.weight.normal_(0.0, 0.02, generator=generator)
            elif isinstance(module, nn.RMSNorm | nn.LayerNorm):
                module.reset_parameters()
        self.head.reset_parameters(generator)
        for layer, block in enumerate(self.blocks):
            depth: dict[str, Any] = {"num_layers": len(self.blocks), "layer": layer, "generator": generator}
            for module in block.modules():
                if isinstance(module, Attention):
                    for linear in (module.q_proj, module.k_proj, module.v_proj):
                        init_linear(linear, self.config.init, **depth)
                    init_linear(module.o_proj, self.config.init, residual=True, **depth)
                elif isinstance(module, FeedForward):
                    module.reset_parameters(**depth)

    def forward(
        self,
        tokens: Tensor,
        *,
        cache: Sequence[LayerCache] | None = None,
        positions: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, T, V) of tokens (B, T); see `hidden` for the rest."""
        hidden = self.hidden(tokens, cache=cache, positions=positions, attention_mask=attention_mask)
        return self.logits(hidden)

    def hidden(
        self,
        tokens: Tensor,
        *,
        cache: Sequence[LayerCache] | None = None,
        positions: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """The final hidden states (B, T, D), which `logits` and `loss` read.

        Args:
            tokens: (B, T), int64 or int32.
            cache: one LayerCache a block; the tokens continue what it holds and are added to it.
            positions: (T) or (B, T); left out, each token's place among the real ones.
            attention_mask: (B, S), bool or integers, False or 0 at padding, over all S positions: the cached
                ones and these.

        Raises:
            ValueError: no (B, T), a window that is too long, a token outside the vocabulary, or a mask that
                does not fit. TypeError: a mask of floats.
        """
        start = cache[0].length if cache else 0
        S = start + tokens.shape[-1] if tokens.ndim == 2 else 0
        if tokens.ndim != 2 or self.config.max_seq_len < S:
            held = f" after {start} cached" if start else ""
            raise ValueError(
                f"Transformer wants tokens (B, T) with T <= {self.config.max_seq_len}; got "
                f"{tuple(tokens.shape)}{held}; cut the sequence or build with a larger max_seq_len"
            )
        mask = None
        if attention_mask is not None:
            attention_mask = _real(attention_mask, (tokens.shape[0], S))
            mask = padding_mask(attention_mask, S - start, self.config.causal)
        if positions is None and self.config.position != "none":
            if attention_mask is None:
                positions = torch.arange(start, S, device=tokens.device)
            else:
                positions = (attention_mask.cumsum(-1) - 1).clamp_(min=0)[:, start:]
        x = self.embedding(tokens, positions)
        rotary = None
        if self.config.position == "rotary" and positions is not None:
            c = self.config
            rotary = rotary_tables(positions, c.head_channels, c.rope_base, c.rope_scaling)
        for i, block in enumerate(self.blocks):
            x = block(x, rotary, mask, cache[i] if cache else None)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., V) from final hidden states (..., D)."""
        return self.head(hidden, self._table())

    def loss(
        self,
        tokens: Tensor,
        targets: Tensor,
        *,
        attention_mask: Tensor | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """The mean cross entropy, in nats, of targets (B, T) given tokens (B, T); a scalar.

        The logits of a large vocabulary are never all stored; see `ffn.nn.loss`. attention_mask (B, T) hides
        padding from the other tokens, see `hidden`; what is not to be learned wants ignore_index as target.
        """
        return self.head.loss(
            self.hidden(tokens, attention_mask=attention_mask),
            targets,
            self._table(),
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
        )

    def save(self, path: str | Path, format: Literal["ffn", "hf"] = "ffn") -> None:
        """Write a folder that `ffn.load` reads; as "hf" transformers' from_pretrained reads it too."""
        from ffn import checkpoint  # the one way up: files know the model, and the model how to ask for them

        checkpoint.save(path, self, format)

    def num_parameters(self) -> int:
        """Every weight counted once, the tied ones too."""
        return sum(p.numel() for p in self.parameters())

    def _table(self) -> Tensor | None:
        return self.embedding.weight if self.config.tie_embeddings else None


def _real(attention_mask: Tensor, shape: tuple[int, int]) -> Tensor:
    """The mask as bool, once it is known to fit."""
    if attention_mask.shape != shape:
        got = tuple(attention_mask.shape)
        raise ValueError(f"attention_mask wants (B, S) = {shape}, the cached positions and these; got {got}")
    if attention_mask.is_floating_point():
        got = str(attention_mask.dtype)[6:]
        raise TypeError(f"attention_mask wants bool or 0 and 1, False at padding; got {got}")
    return attention_mask.bool()
