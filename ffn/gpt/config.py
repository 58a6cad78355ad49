"""TransformerConfig: the sizes and choices that make a Transformer."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf, log
from typing import Any, Literal

from ffn import activations
from ffn.files.dataclass_toml import from_dict, from_toml, settle, to_toml
from ffn.nn.attention import check_heads
from ffn.nn.block import check_norms
from ffn.nn.feed_forward import gated_hidden_dim
from ffn.nn.head import check_head_activation
from ffn.nn.init import check_init
from ffn.nn.rotary import Interpolation, Llama3, Scaling, Yarn
from ffn.ops.arguments import check_options
from ffn.ops.dropout import check_probability

_POSITIVE = (
    "vocab_size", "dim", "num_layers", "num_heads", "num_kv_heads", "head_dim", "hidden_dim", "max_seq_len",
    "sliding_window", "attention_scale", "attention_softcap", "rope_base", "rope_scaling", "rope_fraction",
    "rope_original_seq_len", "rope_low_freq_factor", "rope_high_freq_factor", "rope_beta_fast",
    "rope_beta_slow", "rope_attention_factor", "norm_eps", "logit_softcap", "chunk_tokens",
)  # fmt: skip


@dataclass(frozen=True)
class TransformerConfig:
    """The sizes and choices that make a Transformer; checked when built, written to TOML and back.

    Sizes left out (None) follow from the others; `kv_heads`, `head_channels` and `hidden_width` hold them.
    Layers are counted from 0.

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
    bias: bool = False  # of the feed-forward's Linears
    attention_bias: bool = False  # of the queries', keys' and values' Linears
    attention_out_bias: bool | None = None  # of the attention output's Linear; as bias
    qk_norm: bool = False  # an RMSNorm of queries and keys
    qk_norm_scope: Literal["head", "all"] = "head"  # over the channels of each head, or of all together
    sliding_window: int | None = None  # positions a token sees, its own counted; all
    full_attention_layers: tuple[int, ...] = ()  # layers without the window
    attention_scale: float | None = None  # of the scores; 1 / sqrt(head_channels)
    attention_softcap: float | None = None  # scores s become softcap tanh(s / softcap)
    position: Literal["rotary", "learned", "none"] = "rotary"
    position_offset: int = 0  # rows of the learned positions before that of position 0
    pad_token_id: int | None = None  # learned: counts for no position and has the row before position 0's
    rope_base: float = 10_000.0
    rope_type: Literal["linear", "llama3", "yarn"] = "linear"  # see ffn.nn.rotary
    rope_scaling: float = 1.0  # positions are divided by it: all (linear), or those of slow channels
    rope_fraction: float = 1.0  # of a head's channels, the first of which turn
    rope_original_seq_len: int | None = None  # llama3, yarn: the window of pretraining; max_seq_len
    rope_low_freq_factor: float = 1.0  # llama3
    rope_high_freq_factor: float = 4.0  # llama3
    rope_beta_fast: float = 32.0  # yarn
    rope_beta_slow: float = 1.0  # yarn
    rope_truncate: bool = True  # yarn
    rope_attention_factor: float | None = None  # yarn: of cosines and sines; 0.1 log(rope_scaling) + 1
    no_rope_layers: tuple[int, ...] = ()  # layers that know no positions
    norm: Literal["rmsnorm", "layernorm", "rmsnorm1p"] = "rmsnorm"
    norm_eps: float = 1e-5
    norm_position: Literal["pre", "post", "output", "sandwich"] = "pre"
    parallel: bool = False  # attention and feed-forward read the same input
    shared_norm: bool = True  # parallel: through one norm
    causal: bool = True
    embedding_scale: float = 1.0  # of the tokens' rows
    embedding_norm: bool = False
    num_token_types: int = 0
    tie_embeddings: bool = True
    head: Literal["logits", "mlm", "none"] = "logits"  # mlm: BERT's; none: hidden states come out
    head_activation: str = "gelu"  # mlm
    logit_softcap: float | None = None  # logits z become softcap tanh(z / softcap)
    dropout: float = 0.0  # after the embedding, the attention and the feed-forward
    ffn_dropout: float = 0.0  # after the activation
    attention_dropout: float = 0.0  # on the attention weights
    save: Literal["preact", "input"] = "preact"  # what the feed-forward keeps for backward
    chunk_tokens: int | None = None  # with save="input"
    init: str = "gpt2"

    def __post_init__(self):
        settle(self)
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is not None and not 0 < value < inf:
                kind = "whole number" if isinstance(value, int) else "number"
                raise ValueError(f"{name}={value}: want a positive {kind}")
        for name in ("position_offset", "num_token_types"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: want 0 or more")
        for name in ("dropout", "ffn_dropout", "attention_dropout"):
            check_probability(name, getattr(self, name))
        check_options(activations.resolve(self.activation), 0.0, self.save, self.chunk_tokens, "auto")
        check_init(self.init)
        check_heads(self.dim, self.num_heads, self.num_kv_heads, self.head_dim)
        check_norms(self.norm_position, self.parallel, self.shared_norm)
        check_head_activation(self.head_activation)
        self._check_layers()
        self._check_rope()
        if self.pad_token_id is not None and (self.causal or not self.position_offset):
            raise ValueError(
                f"pad_token_id={self.pad_token_id} wants an encoder (causal=False) with learned positions "
                "and a row before the first one (position_offset of 1 or more)"
            )
        if self.position_offset and self.position != "learned":
            raise ValueError(f"position_offset={self.position_offset}: want position='learned'")

    def _check_layers(self) -> None:
        for name in ("full_attention_layers", "no_rope_layers"):
            layers = getattr(self, name)
            if not all(0 <= layer < self.num_layers for layer in layers):
                raise ValueError(f"{name}={layers}: want layers from 0 to {self.num_layers - 1}")
        if self.sliding_window is not None and not self.causal:
            raise ValueError(f"sliding_window={self.sliding_window} with causal=False: leave one of them out")

    def _check_rope(self) -> None:
        if self.position != "rotary":
            return
        if self.rope_channels % 2 or not self.rope_channels:
            if self.rope_fraction == 1.0:
                raise ValueError(
                    f"position='rotary' turns pairs of channels, but head_dim={self.head_channels} is odd; "
                    "choose an even head_dim or another position"
                )
            raise ValueError(
                f"rope_fraction={self.rope_fraction} of head_dim={self.head_channels} leaves "
                f"{self.rope_channels} channels: want an even number of them, to turn in pairs"
            )
        if self.rope_fraction > 1.0:
            raise ValueError(f"rope_fraction={self.rope_fraction}: want a share up to 1")
        if self.rope_type == "llama3" and not self.rope_low_freq_factor < self.rope_high_freq_factor:
            low, high = self.rope_low_freq_factor, self.rope_high_freq_factor
            raise ValueError(f"rope_low_freq_factor={low}: want less than rope_high_freq_factor={high}")
        if self.rope_type == "yarn" and self.rope_base == 1.0:
            raise ValueError("rope_base=1.0 with rope_type='yarn': all channels turn alike; want more")

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

    @property
    def out_bias(self) -> bool:
        """Whether the attention output has a bias: attention_out_bias, or as the feed-forward."""
        return self.bias if self.attention_out_bias is None else self.attention_out_bias

    @property
    def rope_channels(self) -> int:
        """How many channels of a head turn."""
        return int(self.head_channels * self.rope_fraction)

    @property
    def rotary_scaling(self) -> Scaling:
        """How the rotary frequencies are stretched."""
        factor, original = self.rope_scaling, self.rope_original_seq_len or self.max_seq_len
        if self.rope_type == "llama3":
            return Llama3(factor, original, self.rope_low_freq_factor, self.rope_high_freq_factor)
        if self.rope_type == "yarn":
            amplitude = self.rope_attention_factor or (0.1 * log(factor) + 1.0 if factor > 1 else 1.0)
            fast, slow = self.rope_beta_fast, self.rope_beta_slow
            return Yarn(factor, original, amplitude, fast, slow, self.rope_truncate)
        return Interpolation(factor)

    def window(self, layer: int) -> int | None:
        """How many positions back a layer sees; None for all."""
        return None if layer in self.full_attention_layers else self.sliding_window

    def to_toml(self) -> str:
        """One `key = value` line a field."""
        return to_toml(self)

    @classmethod
    def from_toml(cls, text: str) -> "TransformerConfig":
        """Read `to_toml`'s text, or any part of it: what is left out has its default."""
        return from_toml(cls, text)

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any], prefix: str = "model") -> "TransformerConfig":
        """Build from a mapping; an unknown key is refused with the nearest one: `model.n_layer is not a
        key; did you mean model.num_layers?`."""
        return from_dict(cls, mapping, prefix)
