"""The oracle: tiny transformers models in float64, of unusual sizes, with every supported option.

transformers computes its RMSNorms and the softmax of eager attention in float32 even in a float64 model.
`in_float64` makes the oracle exact there, so that the tolerance stays tight. Rotary tables are float32 in
theirs and in ours, and equal bit for bit.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

transformers = pytest.importorskip("transformers")

VOCAB, WINDOW = 37, 32
LLAMA = {
    "vocab_size": VOCAB, "hidden_size": 20, "intermediate_size": 17, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": WINDOW,
    "rms_norm_eps": 1e-3,
}  # fmt: skip
GPT2 = {"vocab_size": VOCAB, "n_embd": 15, "n_head": 5, "n_layer": 2, "n_inner": 23, "n_positions": WINDOW}
NEOX = {
    "vocab_size": VOCAB, "hidden_size": 20, "intermediate_size": 23, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": WINDOW,
}  # fmt: skip
BERT = {
    "vocab_size": VOCAB, "hidden_size": 15, "intermediate_size": 23, "num_hidden_layers": 2,
    "num_attention_heads": 3, "max_position_embeddings": WINDOW, "type_vocab_size": 3,
}  # fmt: skip
DISTIL = {"vocab_size": VOCAB, "dim": 15, "n_heads": 3, "n_layers": 2, "hidden_dim": 23,
          "max_position_embeddings": WINDOW}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 3.0,
          "original_max_position_embeddings": 8, "rope_theta": 50.0}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "rope_theta": 50.0}

# name -> (class of the model, options of its config)
DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", LLAMA | {"head_dim": 6, "attention_bias": True, "mlp_bias": True}),
    "llama-llama3": ("LlamaForCausalLM", LLAMA | {"tie_word_embeddings": True, "rope_parameters": LLAMA3,
                                                  "head_dim": 14, "hidden_act": "gelu"}),
    "llama-yarn": ("LlamaForCausalLM", LLAMA | {"rope_parameters": YARN, "head_dim": 14, "mlp_bias": True}),
    "llama-linear": ("LlamaForCausalLM", LLAMA | {"rope_scaling": {"type": "linear", "factor": 3.0},
                                                  "rope_theta": 77.0, "head_dim": 2, "attention_bias": True}),
    "llama-bare": ("LlamaModel", LLAMA | {"head_dim": 6}),
    "mistral": ("MistralForCausalLM", LLAMA | {"sliding_window": 4, "head_dim": 6}),
    "mistral-full": ("MistralForCausalLM", LLAMA | {"sliding_window": None, "head_dim": 6}),
    "qwen2": ("Qwen2ForCausalLM", LLAMA | {"use_sliding_window": True, "sliding_window": 5, "head_dim": 12,
                                           "max_window_layers": 1, "tie_word_embeddings": True,
                                           "rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.3,
                                                                      "beta_fast": 5, "truncate": False}}),
    "qwen2-full": ("Qwen2ForCausalLM", LLAMA | {"hidden_size": 24}),
    "qwen3": ("Qwen3ForCausalLM", LLAMA | {"head_dim": 6, "attention_bias": True, "use_sliding_window": True,
                                           "sliding_window": 3, "rope_parameters": LLAMA3,
                                           "layer_types": ["sliding_attention", "full_attention",
                                                           "sliding_attention"]}),
    "smollm3": ("SmolLM3ForCausalLM", LLAMA | {"hidden_size": 24, "no_rope_layer_interval": 2,
                                               "mlp_bias": True, "use_sliding_window": True,
                                               "sliding_window": 4, "pad_token_id": None}),
    "smollm3-list": ("SmolLM3ForCausalLM", LLAMA | {"hidden_size": 24, "no_rope_layers": [0, 1, 0],
                                                    "attention_bias": True, "tie_word_embeddings": False,
                                                    "pad_token_id": None}),
    "olmo2": ("Olmo2ForCausalLM", LLAMA | {"hidden_size": 24, "attention_bias": True,
                                           "rope_parameters": YARN | {"attention_factor": 1.7}}),
    "phi3": ("Phi3ForCausalLM", LLAMA | {"hidden_size": 40, "sliding_window": 5, "pad_token_id": None,
                                         "rope_parameters": {"rope_type": "default", "rope_theta": 99.0,
                                                             "partial_rotary_factor": 0.4}}),
    "gemma": ("GemmaForCausalLM", LLAMA | {"head_dim": 6, "num_key_value_heads": 1, "attention_bias": True}),
    "gemma-untied": ("GemmaForCausalLM", LLAMA | {"head_dim": 14, "hidden_act": "silu",
                                                  "tie_word_embeddings": False}),
    "gemma2": ("Gemma2ForCausalLM", LLAMA | {"head_dim": 6, "sliding_window": 3, "query_pre_attn_scalar": 7,
                                             "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma2-uncapped": ("Gemma2ForCausalLM", LLAMA | {"head_dim": 6, "attn_logit_softcapping": None,
                                                      "sliding_window": 5, "attention_bias": True,
                                                      "layer_types": ["full_attention", "sliding_attention",
                                                                      "full_attention"],
                                                      "final_logit_softcapping": None}),
    "gpt2": ("GPT2LMHeadModel", GPT2),
    "gpt2-untied": ("GPT2LMHeadModel", GPT2 | {"tie_word_embeddings": False, "n_inner": None,
                                               "activation_function": "relu", "scale_attn_weights": False}),
    "gpt2-bare": ("GPT2Model", GPT2),
    "gpt_neox": ("GPTNeoXForCausalLM", NEOX | {"rotary_pct": 0.4, "rotary_emb_base": 55}),
    "gpt_neox-serial": ("GPTNeoXForCausalLM", NEOX | {"use_parallel_residual": False, "attention_bias": False,
                                                      "hidden_size": 24, "tie_word_embeddings": True,
                                                      "rope_scaling": {"type": "linear", "factor": 2.0},
                                                      "rotary_pct": 1.0, "hidden_act": "gelu_new"}),
}  # fmt: skip
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertForMaskedLM", BERT),
    "bert-untied": ("BertForMaskedLM", BERT | {"tie_word_embeddings": False, "hidden_act": "relu"}),
    "bert-bare": ("BertModel", BERT | {"hidden_act": "gelu_new"}),
    "distilbert": ("DistilBertForMaskedLM", DISTIL),
    "distilbert-untied": ("DistilBertForMaskedLM", DISTIL | {"tie_word_embeddings": False,
                                                             "activation": "relu"}),
    "distilbert-sinusoids": ("DistilBertForMaskedLM", DISTIL | {"sinusoidal_pos_embds": True}),
    "distilbert-bare": ("DistilBertModel", DISTIL),
    "roberta": ("RobertaForMaskedLM", BERT | {"pad_token_id": 2, "layer_norm_eps": 1e-3}),
    "roberta-untied": ("RobertaForMaskedLM", BERT | {"tie_word_embeddings": False, "hidden_act": "relu"}),
    "roberta-bare": ("RobertaModel", BERT),
}  # fmt: skip
CASES = DECODERS | ENCODERS
cases = pytest.mark.parametrize("name", CASES)
decoders = pytest.mark.parametrize("name", DECODERS)


def build_theirs(name: str) -> Any:
    """Build the oracle, with weights large enough to show every difference."""
    cls, options = CASES[name]
    model_class = getattr(transformers, cls)
    attention = "eager" if cls.startswith("Gemma2") else "sdpa"
    config = model_class.config_class(**options, attn_implementation=attention)
    return randomize(model_class(config)).double().eval()


@torch.no_grad()
def randomize(model: Any) -> Any:
    for parameter in model.parameters():
        parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.3)
    return model


def output_of(model: Any, tokens: Tensor, **rest: Any) -> Tensor:
    """Return logits, or the hidden states of a base model."""
    with in_float64(model), torch.no_grad():
        out = model(tokens, **rest)
    return out.logits if "logits" in out else out.last_hidden_state


@contextmanager
def in_float64(model: nn.Module) -> Iterator[None]:
    """Let the oracle compute its norms and softmax in float64."""
    norms = [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]
    for norm in norms:
        norm.forward = lambda x, norm=norm: _norm(norm, x)
    softmax = F.softmax

    def exact(x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
        return softmax(x, dim, dtype=x.dtype)

    try:
        with mock.patch.object(F, "softmax", exact):
            yield
    finally:
        for norm in norms:
            del norm.forward


def _norm(norm: Any, x: Tensor) -> Tensor:
    gemma = type(norm).__name__.startswith("Gemma")
    eps = norm.eps if gemma else norm.variance_epsilon
    normed = x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps)
    return normed * (1.0 + norm.weight if gemma else norm.weight)
