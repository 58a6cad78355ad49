"""Cost of a model before it is built: parameters, FLOPs, and bytes saved for backward by the feed-forward."""

from typing import NamedTuple

from ffn import activations
from ffn.gpt.transformer import TransformerConfig
from ffn.text_table import columns


class Part(NamedTuple):
    """One part of a model, summed over its layers. flops: per token forward, two per multiply-add."""

    name: str
    parameters: int
    flops: int


def parameter_table(config: TransformerConfig, seq_len: int | None = None) -> list[Part]:
    """Return the parts in forward order. Their parameters add up to those of the built model.

    FLOPs are those of the matmuls over a whole sequence, divided by its length. A causal token attends to
    (seq_len + 1) / 2 keys on average, to fewer with a sliding window; without causal it attends to seq_len.
    Norms, activations, rotations, biases and the softmax are not counted.

    Args:
        seq_len: tokens in the sequence; default config.max_seq_len.
    """
    c, T = config, _length(config, seq_len)
    D, H, V, L = c.dim, c.hidden_width, c.vocab_size, c.num_layers
    queries, keys = c.num_heads * c.head_channels, c.kv_heads * c.head_channels
    qkv = D * (queries + 2 * keys)
    products = 3 if activations.resolve(c.activation).gated else 2
    ffn_bias = (products - 1) * H + D
    norm = 2 * D if c.norm == "layernorm" else D
    normed = queries + keys if c.qk_norm_scope == "all" else 2 * c.head_channels
    a_block = {"sandwich": 4}.get(c.norm_position, 1 if c.parallel and c.shared_norm else 2)
    norms = L * a_block + (c.norm_position != "post") + c.embedding_norm + (c.head == "mlm")
    attended = sum(_keys(c, layer, T) for layer in range(L))
    matrix = V * D if c.head != "none" else 0
    transform = D * D if c.head == "mlm" else 0
    return [
        Part("token table", V * D, 0),
        Part("position table", (c.position_offset + c.max_seq_len) * D if c.position == "learned" else 0, 0),
        Part("token types", c.num_token_types * D, 0),
        Part("q, k, v", L * (qkv + c.attention_bias * (queries + 2 * keys)), 2 * L * qkv),
        Part("q/k norm", L * normed * c.qk_norm, 0),
        Part("attention", 0, 4 * queries * attended // T),  # q k^T and the weighted sum of v
        Part("attention output", L * (queries * D + c.out_bias * D), 2 * L * queries * D),
        Part("feed-forward", L * (products * D * H + c.bias * ffn_bias), 2 * L * products * D * H),
        Part("norms", norms * norm, 0),
        Part("head transform", transform + (D + V if transform else 0), 2 * transform),
        Part("head", 0 if c.tie_embeddings else matrix, 2 * matrix),
    ]


def _keys(c: TransformerConfig, layer: int, T: int) -> int:
    """Return how many keys the tokens of a sequence attend to in a layer, summed over the tokens."""
    if not c.causal:
        return T * T
    W = min(c.window(layer) or T, T)
    return W * T - W * (W - 1) // 2


def flops_per_token(config: TransformerConfig, seq_len: int | None = None, *, training: bool = False) -> int:
    """Return forward FLOPs per token; training adds twice as many for the two gradients of each matmul.

    They are counted as in `parameter_table`. Recomputation with save="input" is not counted.
    """
    forward = sum(part.flops for part in parameter_table(config, seq_len))
    return 3 * forward if training else forward


def render_table(config: TransformerConfig, seq_len: int | None = None) -> str:
    """Return the non-empty parts and their totals as text for a terminal."""
    parts = [part for part in parameter_table(config, seq_len) if part.parameters or part.flops]
    total = Part("total", sum(part.parameters for part in parts), sum(part.flops for part in parts))
    rows = [("part", "parameters", "", "FLOPs per token", "")]
    for part in [*parts, total]:
        shares = part.parameters / total.parameters, part.flops / total.flops
        numbers = f"{part.parameters:,}", f"{shares[0]:.1%}", f"{part.flops:,}", f"{shares[1]:.1%}"
        rows.append((part.name, *numbers))
    lines = columns(rows)
    rule = "-" * max(map(len, lines))
    footnote = f"forward, in a sequence of {_length(config, seq_len)} tokens"
    return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1], footnote])


def kept_elements(config: TransformerConfig, save: str) -> int:
    """Return elements per token that all feed-forward blocks together save for backward.

    Args:
        save: "preact" saves each block's input and preactivations, "input" the input alone. Dropout saves
            nothing more.
    """
    widths = 2 if activations.resolve(config.activation).gated else 1
    return config.num_layers * (config.dim + (widths * config.hidden_width if save == "preact" else 0))


def render_kept(config: TransformerConfig) -> str:
    """Return the bytes saved for backward by the feed-forward blocks, per save mode and dtype, as text."""
    T = config.max_seq_len
    rows = [("saved for backward by feed-forward", "", "per token", f"per sequence of {T:,}")]
    for save in ("preact", "input"):
        elements = kept_elements(config, save)
        for name, size in (("float32", 4), ("bfloat16", 2)):
            token = f"{size * elements:,} bytes"
            rows.append((f'save="{save}"', name, token, f"{size * elements * T / 2**20:,.1f} MiB"))
    return "\n".join(columns(rows, left=2))


def _length(config: TransformerConfig, seq_len: int | None) -> int:
    return config.max_seq_len if seq_len is None else seq_len
