"""The supported decoders, with the defaults that transformers gives to absent keys."""

from dataclasses import replace

from ffn.interop.hf.family import Family
from ffn.interop.hf.keys import (
    ATTENTION_BIAS,
    EMBEDDING_SCALE,
    GATED,
    NORM_EACH,
    PLAIN,
    QUERY_SCALAR,
    SCALE_SWITCH,
    activation,
    dropout,
    windows,
)
from ffn.interop.hf.rope import rope, rotary_layers


def _decoder(name: str) -> dict[str, str]:
    return {"logits": f"{name}ForCausalLM", "none": f"{name}Model"}


_ROPE_KEYS = dict.fromkeys(
    (
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        "partial_rotary_factor",
        "original_max_position_embeddings",
    )
)
_SIZES = {
    "vocab_size": "vocab_size",
    "dim": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "hidden_dim": "intermediate_size",
    "max_seq_len": "max_position_embeddings",
    "tie_embeddings": "tie_word_embeddings",
}
_GROUPED = _SIZES | {
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "norm_eps": "rms_norm_eps",
    "attention_dropout": "attention_dropout",
}
_SILU = activation("hidden_act", GATED)

LLAMA = Family(
    classes=_decoder("Llama"),
    defaults={
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": None, "head_dim": None, "hidden_act": "silu",
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
        "attention_bias": False, "attention_dropout": 0.0, "mlp_bias": False, **_ROPE_KEYS,
    },
    fields=_GROUPED | {"bias": "mlp_bias"},
    parts=(_SILU, rope(), ATTENTION_BIAS),
    divides=True,
)  # fmt: skip

_PLAIN_LLAMA = {
    key: value for key, value in LLAMA.defaults.items() if key not in ("attention_bias", "mlp_bias")
}

MISTRAL = Family(
    classes=_decoder("Mistral"),
    defaults=_PLAIN_LLAMA | {
        "intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 4096 * 32,
        "sliding_window": 4096, "layer_types": None,
    },
    fields=_GROUPED,
    parts=(_SILU, rope(), windows()),
)  # fmt: skip

QWEN2 = Family(
    classes=_decoder("Qwen2"),
    defaults=_PLAIN_LLAMA | {
        "vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32,
        "max_position_embeddings": 32768, "use_sliding_window": False, "sliding_window": 4096,
        "max_window_layers": 28, "layer_types": None,
    },
    fields=_GROUPED,
    parts=(_SILU, rope(), windows(lambda k, i: i >= k["max_window_layers"], "use_sliding_window")),
    constants={"attention_bias": True, "attention_out_bias": False},
)  # fmt: skip

QWEN3 = replace(
    QWEN2,
    classes=_decoder("Qwen3"),
    defaults=dict(QWEN2.defaults) | {"head_dim": 128, "attention_bias": False},
    parts=(*QWEN2.parts, ATTENTION_BIAS),
    constants={"qk_norm": True},
)

PHI3 = Family(
    classes=_decoder("Phi3"),
    defaults=_PLAIN_LLAMA | {
        "vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192, "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5, "sliding_window": None, "layer_types": None, "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
    },
    fields=_GROUPED,
    parts=(_SILU, rope(fraction=1.0, kinds=("default",)), windows(), dropout("resid_pdrop", "embd_pdrop")),
)  # fmt: skip

# "gelu" meant the tanh approximation in Gemma's first files, and transformers still reads it so
_GEMMA_ACTIVATIONS = {name: ours for name, ours in GATED.items() if name != "gelu"} | {"gelu": "geglu_tanh"}
GEMMA = Family(
    classes=_decoder("Gemma"),
    defaults=_PLAIN_LLAMA | {
        "vocab_size": 256000, "hidden_size": 3072, "intermediate_size": 24576, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh", "max_position_embeddings": 8192, "tie_word_embeddings": True,
        "attention_bias": False,
    },
    fields=_GROUPED,
    parts=(activation("hidden_act", _GEMMA_ACTIVATIONS), rope(), ATTENTION_BIAS, EMBEDDING_SCALE),
    constants={"norm": "rmsnorm1p"},
    only={"hidden_activation": ("gelu_pytorch_tanh",)},
)  # fmt: skip

GEMMA2 = Family(
    classes=_decoder("Gemma2"),
    defaults={key: value for key, value in GEMMA.defaults.items() if key != "hidden_act"} | {
        "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8,
        "num_key_value_heads": 4, "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256,
        "sliding_window": 4096, "layer_types": None, "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 50.0,
    },
    fields=_GROUPED
    | {"logit_softcap": "final_logit_softcapping", "attention_softcap": "attn_logit_softcapping"},
    parts=(
        activation("hidden_activation", GATED), rope(), ATTENTION_BIAS, EMBEDDING_SCALE, QUERY_SCALAR,
        windows(lambda k, i: i % 2 == 0),
    ),
    constants={"norm": "rmsnorm1p", "norm_position": "sandwich"},
    only={"hidden_act": ("gelu_pytorch_tanh",)},
    nullable=LLAMA.nullable | {"final_logit_softcapping", "attn_logit_softcapping"},
    divides=True,
)  # fmt: skip

OLMO2 = Family(
    classes=_decoder("Olmo2"),
    defaults=_PLAIN_LLAMA | {"vocab_size": 50304, "rms_norm_eps": 1e-5, "attention_bias": False},
    fields=_GROUPED,
    parts=(_SILU, rope(), ATTENTION_BIAS),
    constants={"norm_position": "output", "qk_norm": True, "qk_norm_scope": "all"},
)

SMOLLM3 = Family(
    classes=_decoder("SmolLM3"),
    defaults=dict(LLAMA.defaults) | {
        "vocab_size": 128256, "hidden_size": 2048, "num_hidden_layers": 36, "num_attention_heads": 16,
        "num_key_value_heads": 4, "max_position_embeddings": 32768, "tie_word_embeddings": True,
        "use_sliding_window": False, "sliding_window": None, "layer_types": None, "no_rope_layers": None,
        "no_rope_layer_interval": 4,
    },
    fields=LLAMA.fields,
    parts=(
        _SILU, rope(2_000_000.0, skips=True), ATTENTION_BIAS,
        windows(lambda k, i: not rotary_layers(k)[i], "use_sliding_window"),
    ),
)  # fmt: skip

GPT2 = Family(
    classes={"logits": "GPT2LMHeadModel", "none": "GPT2Model"},
    defaults={
        "vocab_size": 50257, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_inner": None, "n_positions": 1024,
        "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
        "scale_attn_weights": True, "resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1,
    },
    fields={
        "vocab_size": "vocab_size", "dim": "n_embd", "num_layers": "n_layer", "num_heads": "n_head",
        "hidden_dim": "n_inner", "max_seq_len": "n_positions", "norm_eps": "layer_norm_epsilon",
        "tie_embeddings": "tie_word_embeddings", "attention_dropout": "attn_pdrop",
    },
    parts=(activation("activation_function", PLAIN), SCALE_SWITCH, dropout("resid_pdrop", "embd_pdrop")),
    constants={"position": "learned", "norm": "layernorm", "bias": True, "attention_bias": True},
    only={"scale_attn_by_inverse_layer_idx": (False,)},
    synonyms={"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
              "max_position_embeddings": "n_positions"},
)  # fmt: skip

GPT_NEOX = Family(
    classes=_decoder("GPTNeoX"),
    defaults={
        "vocab_size": 50432, "hidden_size": 6144, "num_hidden_layers": 44, "num_attention_heads": 64,
        "intermediate_size": 24576, "hidden_act": "gelu", "max_position_embeddings": 2048,
        "layer_norm_eps": 1e-5, "tie_word_embeddings": False, "use_parallel_residual": True,
        "attention_bias": True, "attention_dropout": 0.0, "hidden_dropout": 0.0, "rotary_pct": None,
        "rotary_emb_base": None, **_ROPE_KEYS,
    },
    fields=_SIZES | {
        "norm_eps": "layer_norm_eps", "parallel": "use_parallel_residual", "dropout": "hidden_dropout",
        "attention_dropout": "attention_dropout",
    },
    parts=(
        activation("hidden_act", PLAIN), ATTENTION_BIAS, NORM_EACH,
        rope(fraction=0.25, base_key="rotary_emb_base", fraction_key="rotary_pct"),
    ),
    constants={"norm": "layernorm", "bias": True},
)  # fmt: skip

DECODERS = {
    "llama": LLAMA, "mistral": MISTRAL, "qwen2": QWEN2, "qwen3": QWEN3, "smollm3": SMOLLM3, "olmo2": OLMO2,
    "phi3": PHI3, "gemma": GEMMA, "gemma2": GEMMA2, "gpt2": GPT2, "gpt_neox": GPT_NEOX,
}  # fmt: skip
