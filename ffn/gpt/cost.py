"""What a model costs before it is built: parameters and floating-point operations part by part, and what
training keeps of the feed-forward blocks."""

from typing import NamedTuple

from ffn import activations
from ffn.gpt.transformer import TransformerConfig
from ffn.text_table import columns


class Part(NamedTuple):
    """One part of a model, all layers together. flops: of one token forward, two a multiply-add."""

    name: str
    parameters: int
    flops: int


def parameter_table(config: TransformerConfig, seq_len: int | None = None) -> list[Part]:
    """The parts in the order tokens meet them; their parameters add up to the built model's, exactly.

    Operations are those of the matrix products, counted over a whole sequence and divided by its length: a
    causal token looks at (seq_len + 1) / 2 keys on average, with a sliding window at fewer, any other at
    seq_len. Norms, activations, rotations, biases and the softmax are left out.

    Args:
        seq_len: tokens in the sequence; config.max_seq_len if left out.
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
    looked_at = sum(_keys(c, layer, T) for layer in range(L))
    matrix = V * D if c.head != "none" else 0
    transform = D * D if c.head == "mlm" else 0
    return [
        Part("token table", V * D, 0),
        Part("position table", (c.position_offset + c.max_seq_len) * D if c.position == "learned" else 0, 0),
        Part("token types", c.num_token_types * D, 0),
        Part("q, k, v", L * (qkv + c.attention_bias * (queries + 2 * keys)), 2 * L * qkv),
        Part("q/k norm", L * normed * c.qk_norm, 0),
        Part("attention", 0, 4 * queries * looked_at // T),  # q k^T and the weighted sum of v
        Part("attention output", L * (queries * D + c.out_bias * D), 2 * L * queries * D),
        Part("feed-forward", L * (products * D * H + c.bias * ffn_bias), 2 * L * products * D * H),
        Part("norms", norms * norm, 0),
        Part("head transform", transform + (D + V if transform else 0), 2 * transform),
        Part("head", 0 if c.tie_embeddings else matrix, 2 * matrix),
    ]


def _keys(c: TransformerConfig, layer: int, T: int) -> int:
    """How many keys the tokens of a sequence look at in a layer, all together."""
    if not c.causal:
        return T * T
    W = min(c.window(layer) or T, T)
    return W * T - W * (W - 1) // 2


def flops_per_token(config: TransformerConfig, seq_len: int | None = None, *, training: bool = False) -> int:
    """Operations a token, forward; training adds twice as many for the two gradients of each product.

    Counted as in `parameter_table`; recomputing (save="input") is not counted.
    """
    forward = sum(part.flops for part in parameter_table(config, seq_len))
    return 3 * forward if training else forward


def render_table(config: TransformerConfig, seq_len: int | None = None) -> str:
    """The parts that are there as plain text, with totals, for reading in a terminal."""
    parts = [part for part in parameter_table(config, seq_len) if part.parameters or part.flops]
    total = Part("total", sum(part.parameters for part in parts), sum(part.flops for part in parts))
    rows = [("part", "parameters", "", "FLOPs a token", "")]
    for part in [*parts, total]:
        shares = part.parameters / total.parameters, part.flops / total.flops
        numbers = f"{part.parameters:,}", f"{shares[0]:.1%}", f"{part.flops:,}", f"{shares[1]:.1%}"
        rows.append((part.name, *numbers))
    lines = columns(rows)
    rule = "-" * max(map(len, lines))
    footnote = f"forward, in a sequence of {_length(config, seq_len)} tokens"
    return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1], footnote])


def kept_elements(config: TransformerConfig, save: str) -> int:
    """Elements that the feed-forward blocks, all layers together, keep for backward, a token.

    save: "preact" keeps the input and the preactivations of each block, "input" the input alone. Dropout
    keeps nothing more.
    """
    widths = 2 if activations.resolve(config.activation).gated else 1
    return config.num_layers * (config.dim + (widths * config.hidden_width if save == "preact" else 0))


def render_kept(config: TransformerConfig) -> str:
    """What training keeps for the feed-forward blocks in each save mode and dtype, as plain text."""
    T = config.max_seq_len
    rows = [("kept for the feed-forward", "", "a token", f"a sequence of {T:,}")]
    for save in ("preact", "input"):
        elements = kept_elements(config, save)
        for name, size in (("float32", 4), ("bfloat16", 2)):
            token = f"{size * elements:,} bytes"
            rows.append((f'save="{save}"', name, token, f"{size * elements * T / 2**20:,.1f} MiB"))
    return "\n".join(columns(rows, left=2))


def _length(config: TransformerConfig, seq_len: int | None) -> int:
    return config.max_seq_len if seq_len is None else seq_len
