"""What a model costs before it is built: its parameters and its floating-point operations, part by part."""

from typing import NamedTuple

from ffn import activations
from ffn.transformer import TransformerConfig


class Part(NamedTuple):
    """One part of a model, all layers together. flops: of one token forward, two a multiply-add."""

    name: str
    parameters: int
    flops: int


def parameter_table(config: TransformerConfig, seq_len: int | None = None) -> list[Part]:
    """The parts in the order tokens meet them; their parameters add up to the built model's, exactly.

    Operations are those of the matrix products, counted over a whole sequence and divided by its length: a
    causal token looks at (seq_len + 1) / 2 keys on average, any other at seq_len. Norms, activations,
    rotations, biases and the softmax are left out.

    Args:
        seq_len: tokens in the sequence; config.max_seq_len if left out.
    """
    c, T = config, _length(config, seq_len)
    D, H, V, L = c.dim, c.hidden_width, c.vocab_size, c.num_layers
    queries, keys = c.num_heads * c.head_channels, c.kv_heads * c.head_channels
    qkv = D * (queries + 2 * keys)
    products = 3 if activations.resolve(c.activation).gated else 2
    ffn_bias = (products - 1) * H + D
    norm = D if c.norm == "rmsnorm" else 2 * D
    norms = L * norm * (1 if c.parallel else 2) + (norm if c.norm_position == "pre" else 0)
    looked_at = 2 * queries * (T + 1 if c.causal else 2 * T)  # q k^T and the weighted sum of v
    return [
        Part("token table", V * D, 0),
        Part("position table", c.max_seq_len * D if c.position == "learned" else 0, 0),
        Part("q, k, v", L * (qkv + c.attention_bias * (queries + 2 * keys)), 2 * L * qkv),
        Part("q/k norm", 2 * L * c.head_channels if c.qk_norm else 0, 0),
        Part("attention", 0, L * looked_at),
        Part("attention output", L * (queries * D + c.bias * D), 2 * L * queries * D),
        Part("feed-forward", L * (products * D * H + c.bias * ffn_bias), 2 * L * products * D * H),
        Part("norms", norms, 0),
        Part("head", 0 if c.tie_embeddings else V * D, 2 * V * D),
    ]


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
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *cells in rows:
        lines.append("  ".join([name.ljust(widths[0]), *map(str.rjust, cells, widths[1:])]).rstrip())
    rule = "-" * max(map(len, lines))
    footnote = f"forward, in a sequence of {_length(config, seq_len)} tokens"
    return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1], footnote])


def _length(config: TransformerConfig, seq_len: int | None) -> int:
    return config.max_seq_len if seq_len is None else seq_len
