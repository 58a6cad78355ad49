"""TransformerConfig: the sizes and options of a Transformer; RotaryConfig: those of its rotary positions."""

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
    "sliding_window", "attention_scale", "attention_softcap", "norm_eps", "logit_softcap", "chunk_tokens",
)  # fmt: skip
_ROTARY_POSITIVE = (
    "theta", "factor", "fraction", "original_seq_len", "low_freq_factor", "high_freq_factor", "beta_fast",
    "beta_slow", "attention_factor",
)  # fmt: skip


def _check_positive(config: Any, names: tuple[str, ...]) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and not 0 < value < inf:
            kind = "integer" if isinstance(value, int) else "number"
            raise ValueError(f"{name} must be a positive {kind}, got {value}")


@dataclass(frozen=True)
class RotaryConfig:
    """The options of rotary positions: `[model.rotary]` in TOML, `model.rotary.theta=500` on a command line.

    Raises:
        ValueError: a value is outside its range, or two values contradict each other.

    Source: see `ffn.nn.rotary` for the three ways of scaling.
    """

    theta: float = 10_000.0  # base of the frequencies; a larger theta rotates more slowly
    scaling: Literal["linear", "llama3", "yarn"] = "linear"
    factor: float = 1.0  # divides the positions: of all channels (linear), or of the slow ones
    fraction: float = 1.0  # share of each head's channels that rotate: the first ones
    skip_layers: tuple[int, ...] = ()  # layers without positions
    original_seq_len: int | None = None  # llama3, yarn: window of pretraining; default max_seq_len
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn
    attention_factor: float | None = None  # yarn: scales cos and sin; default 0.1 log(factor) + 1

    def __post_init__(self):
        settle(self)
        _check_positive(self, _ROTARY_POSITIVE)
        if self.fraction > 1.0:
            raise ValueError(f"fraction must be at most 1, got {self.fraction}")
        if self.scaling == "llama3" and not self.low_freq_factor < self.high_freq_factor:
            low, high = self.low_freq_factor, self.high_freq_factor
            raise ValueError(f"low_freq_factor must be less than high_freq_factor={high}, got {low}")
        if self.scaling == "yarn" and self.theta == 1.0:
            raise ValueError("theta must not be 1 with scaling='yarn': all channels would rotate alike")

    def scaled_to(self, max_seq_len: int) -> Scaling:
        """Return the scaling of the frequencies, for a model with this window."""
        original = self.original_seq_len or max_seq_len
        if self.scaling == "llama3":
            return Llama3(self.factor, original, self.low_freq_factor, self.high_freq_factor)
        if self.scaling == "yarn":
            default = 0.1 * log(self.factor) + 1.0 if self.factor > 1 else 1.0
            amplitude = self.attention_factor or default
            return Yarn(self.factor, original, amplitude, self.beta_fast, self.beta_slow, self.truncate)
        return Interpolation(self.factor)


@dataclass(frozen=True)
class TransformerConfig:
    """The sizes and options of a Transformer. Values are checked when it is built; TOML both ways.

    A size left out (None) follows from the others; `kv_heads`, `head_channels` and `hidden_width` hold the
    result. Layers are counted from 0.

    Raises:
        ValueError: a value is outside its range, or two values contradict each other.
    """

    vocab_size: int
    dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int | None = None  # default num_heads
    head_dim: int | None = None  # default dim / num_heads
    hidden_dim: int | None = None  # default 4 dim, or gated_hidden_dim(dim) for a gated activation
    max_seq_len: int = 1024
    activation: str = "swiglu"
    bias: bool = False  # in the feed-forward Linears
    attention_bias: bool = False  # in the query, key and value Linears
    attention_out_bias: bool | None = None  # in the attention output Linear; default bias
    qk_norm: bool = False  # RMSNorm of queries and keys
    qk_norm_scope: Literal["head", "all"] = "head"  # over the channels of each head, or of all heads
    sliding_window: int | None = None  # positions a token attends to, itself included; default all
    full_attention_layers: tuple[int, ...] = ()  # layers without the window
    attention_scale: float | None = None  # multiplies the scores; default 1 / sqrt(head_channels)
    attention_softcap: float | None = None  # scores s become softcap tanh(s / softcap)
    position: Literal["rotary", "learned", "none"] = "rotary"
    rotary: RotaryConfig = RotaryConfig()  # with position="rotary"
    position_offset: int = 0  # learned: rows of the table before that of position 0
    pad_token_id: int | None = None  # learned: padding takes no position and has the row before position 0's
    norm: Literal["rmsnorm", "layernorm", "rmsnorm1p"] = "rmsnorm"
    norm_eps: float = 1e-5
    norm_position: Literal["pre", "post", "output", "sandwich"] = "pre"
    parallel: bool = False  # attention and feed-forward read the same input
    shared_norm: bool = True  # parallel: both read it through one norm
    causal: bool = True
    embedding_scale: float = 1.0  # multiplies the token embeddings
    embedding_norm: bool = False
    num_token_types: int = 0
    tie_embeddings: bool = True
    head: Literal["logits", "mlm", "none"] = "logits"  # mlm: BERT's; none: the output is the hidden states
    head_activation: str = "gelu"  # mlm
    logit_softcap: float | None = None  # logits z become softcap tanh(z / softcap)
    dropout: float = 0.0  # after the embedding, the attention and the feed-forward
    ffn_dropout: float = 0.0  # after the activation
    attention_dropout: float = 0.0  # on the attention weights
    save: Literal["preact", "input"] = "preact"  # saved for backward by the feed-forward
    chunk_tokens: int | None = None  # with save="input"
    init: str = "gpt2"

    def __post_init__(self):
        settle(self)
        _check_positive(self, _POSITIVE)
        for name in ("position_offset", "num_token_types"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        for name in ("dropout", "ffn_dropout", "attention_dropout"):
            check_probability(name, getattr(self, name))
        check_options(activations.resolve(self.activation), 0.0, self.save, self.chunk_tokens, "auto")
        check_init(self.init)
        check_heads(self.dim, self.num_heads, self.num_kv_heads, self.head_dim)
        check_norms(self.norm_position, self.parallel, self.shared_norm)
        check_head_activation(self.head_activation)
        self._check_layers()
        self._check_positions()

    def _check_layers(self) -> None:
        choices = {
            "full_attention_layers": self.full_attention_layers,
            "rotary.skip_layers": self.rotary.skip_layers,
        }
        for name, layers in choices.items():
            if not all(0 <= layer < self.num_layers for layer in layers):
                raise ValueError(f"{name} must be layers from 0 to {self.num_layers - 1}, got {layers}")
        if self.sliding_window is not None and not self.causal:
            raise ValueError(f"sliding_window must be left out with causal=False, got {self.sliding_window}")

    def _check_positions(self) -> None:
        if self.pad_token_id is not None and (self.causal or not self.position_offset):
            raise ValueError(
                "pad_token_id requires causal=False, position='learned' and position_offset of 1 or more, "
                f"got {self.pad_token_id}"
            )
        if self.position_offset and self.position != "learned":
            raise ValueError(f"position_offset requires position='learned', got {self.position_offset}")
        channels = self.rotary_channels
        if self.position == "rotary" and (channels % 2 or not channels):
            name = "head_dim" if self.rotary.fraction == 1.0 else "rotary.fraction"
            raise ValueError(
                f"{name} must leave an even number of channels to rotate, got {channels} of "
                f"{self.head_channels}; change it or choose another position"
            )

    @property
    def kv_heads(self) -> int:
        """G: num_kv_heads, by default num_heads."""
        return self.num_kv_heads or self.num_heads

    @property
    def head_channels(self) -> int:
        """C: head_dim, by default dim / num_heads."""
        return self.head_dim or self.dim // self.num_heads

    @property
    def hidden_width(self) -> int:
        """H: hidden_dim, by default the feed-forward's own choice for dim."""
        gated = activations.resolve(self.activation).gated
        return self.hidden_dim or (gated_hidden_dim(self.dim) if gated else 4 * self.dim)

    @property
    def out_bias(self) -> bool:
        """True if the attention output has a bias: attention_out_bias, by default bias."""
        return self.bias if self.attention_out_bias is None else self.attention_out_bias

    @property
    def rotary_channels(self) -> int:
        """Channels of each head that rotate."""
        return int(self.head_channels * self.rotary.fraction)

    @property
    def rotary_scaling(self) -> Scaling:
        """Scaling of the rotary frequencies."""
        return self.rotary.scaled_to(self.max_seq_len)

    def window(self, layer: int) -> int | None:
        """Return how many positions a token attends to in a layer; None for all."""
        return None if layer in self.full_attention_layers else self.sliding_window

    def to_toml(self) -> str:
        """Return the config as TOML text: one `key = value` line per field, then the table `[rotary]`."""
        return to_toml(self)

    @classmethod
    def from_toml(cls, text: str) -> "TransformerConfig":
        """Read the text of `to_toml`, or any part of it: absent keys have their defaults."""
        return from_toml(cls, text)

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any], prefix: str = "model") -> "TransformerConfig":
        """Build from a mapping; an unknown key is refused with the nearest one: `model.n_layer is not a
        key; did you mean model.num_layers?`."""
        return from_dict(cls, mapping, prefix)
