"""Build the parts of a Transformer from its config: the embedding, a block, the head."""

from functools import partial
from typing import Any

from ffn.gpt.config import TransformerConfig
from ffn.nn.attention import Attention
from ffn.nn.block import Block
from ffn.nn.embedding import Embedding
from ffn.nn.feed_forward import FeedForward
from ffn.nn.head import Head, HeadTransform
from ffn.nn.norm import build_norm


def build_embedding(c: TransformerConfig, *, device=None, dtype=None) -> Embedding:
    """Build the embedding of a Transformer."""
    factory: dict[str, Any] = {"device": device, "dtype": dtype}
    return Embedding(
        c.vocab_size,
        c.dim,
        c.max_seq_len if c.position == "learned" else None,
        dropout=c.dropout,
        position_offset=c.position_offset,
        num_token_types=c.num_token_types,
        scale=c.embedding_scale,
        norm=partial(build_norm, c.norm, c.dim, c.norm_eps, **factory) if c.embedding_norm else None,
        **factory,
    )


def build_block(c: TransformerConfig, layer: int = 0, *, device=None, dtype=None) -> Block:
    """Build one block of a Transformer; `layer` counts from 0."""
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
        out_bias=c.out_bias,
        qk_norm=partial(build_norm, "rmsnorm", eps=c.norm_eps, **factory) if c.qk_norm else None,
        qk_norm_scope=c.qk_norm_scope,
        window=c.window(layer),
        scale=c.attention_scale,
        softcap=c.attention_softcap,
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
    return Block(
        attention,
        feed_forward,
        norm,
        norm_position=c.norm_position,
        parallel=c.parallel,
        shared_norm=c.shared_norm,
    )


def build_head(c: TransformerConfig, *, device=None, dtype=None) -> Head | None:
    """Build the head of a Transformer; None with head="none"."""
    if c.head == "none":
        return None
    factory: dict[str, Any] = {"device": device, "dtype": dtype}
    transform, masked = None, c.head == "mlm"
    if masked:
        norm = build_norm(c.norm, c.dim, c.norm_eps, **factory)
        transform = HeadTransform(c.dim, c.head_activation, norm, **factory)
    return Head(
        c.dim,
        c.vocab_size,
        tied=c.tie_embeddings,
        bias=masked,
        softcap=c.logit_softcap,
        transform=transform,
        **factory,
    )
