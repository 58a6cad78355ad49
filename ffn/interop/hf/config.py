"""Hugging Face's config.json as TransformerConfig, and back; what we cannot do is refused by its name."""

from collections.abc import Mapping
from typing import Any

from ffn.transformer import TransformerConfig


def read_config(keys: Mapping[str, Any]) -> TransformerConfig:
    """The config of a model, from the mapping that its config.json holds.

    Raises:
        ValueError: an architecture, or a key whose value would change the numbers, that is not supported.
    """
    if keys.get("model_type") != "llama":
        raise ValueError(f"model_type={keys.get('model_type')!r}: not supported; ffn reads llama")
    rope = keys.get("rope_parameters") or keys.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise ValueError(f"rope_type={rope['rope_type']!r}: not supported")
    return TransformerConfig(
        vocab_size=keys["vocab_size"],
        dim=keys["hidden_size"],
        num_layers=keys["num_hidden_layers"],
        num_heads=keys["num_attention_heads"],
        num_kv_heads=keys.get("num_key_value_heads"),
        head_dim=keys.get("head_dim"),
        hidden_dim=keys["intermediate_size"],
        max_seq_len=keys.get("max_position_embeddings", 2048),
        norm_eps=keys.get("rms_norm_eps", 1e-6),
        rope_base=float(rope.get("rope_theta", keys.get("rope_theta", 10_000.0))),
        tie_embeddings=keys.get("tie_word_embeddings", False),
    )


def write_config(config: TransformerConfig, architecture: str) -> dict[str, Any]:
    """The mapping to write as config.json, which transformers' from_pretrained reads.

    Args:
        architecture: their model_type, as "llama".

    Raises:
        ValueError: no such architecture, or the config says what its config.json cannot.
    """
    keys: dict[str, Any] = {
        "model_type": architecture,
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_channels,
        "intermediate_size": config.hidden_width,
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
    }
    if read_config(keys) != config:
        raise ValueError(f"{architecture}: its config.json cannot say what this config does")
    return keys
