"""Small transformers of every kind, and tokens for them."""

import dataclasses

import pytest
import torch
from torch import Tensor

from ffn.gpt.config import RotaryConfig
from ffn.gpt.transformer import Transformer, TransformerConfig

F64 = torch.float64
SMALL = TransformerConfig(vocab_size=13, dim=16, num_layers=2, num_heads=4, hidden_dim=24, max_seq_len=12)
VARIANTS = {
    "llama": {"num_kv_heads": 2},
    "gpt2": {"position": "learned", "norm": "layernorm", "activation": "gelu_tanh", "bias": True,
             "attention_bias": True},
    "post": {"norm_position": "post", "norm": "layernorm", "tie_embeddings": False},
    "parallel": {"parallel": True, "head_dim": 6},
    "qk_norm": {"qk_norm": True, "rotary": RotaryConfig(theta=500.0, factor=2.0)},
    "encoder": {"causal": False, "position": "none"},
    "gemma2": {"norm": "rmsnorm1p", "norm_position": "sandwich", "num_kv_heads": 2, "embedding_scale": 4.0,
               "attention_scale": 0.3, "attention_softcap": 5.0, "logit_softcap": 3.0, "sliding_window": 3,
               "full_attention_layers": (0,)},
    "neox": {"parallel": True, "shared_norm": False, "norm": "layernorm", "activation": "gelu", "bias": True,
             "rotary": RotaryConfig(fraction=0.5), "attention_out_bias": False, "sliding_window": 5},
    "olmo2": {"norm_position": "output", "qk_norm": True, "qk_norm_scope": "all", "num_kv_heads": 2,
              "rotary": RotaryConfig(scaling="yarn", factor=4.0, original_seq_len=4, skip_layers=(0,))},
    "bert": {"causal": False, "norm": "layernorm", "norm_position": "post", "activation": "gelu",
             "bias": True, "attention_bias": True, "position": "learned", "position_offset": 2,
             "num_token_types": 3,
             "embedding_norm": True, "head": "mlm"},
}  # fmt: skip
variants = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)


def build(dtype: torch.dtype = F64, **options) -> Transformer:
    """Draw large weights, so that no error is hidden by small values."""
    model = Transformer(dataclasses.replace(SMALL, **options), dtype=dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(1.0 if p.ndim == 1 else 0.0, 0.3)
    return model


def tokens_of(*shape: int) -> Tensor:
    return torch.randint(13, shape)
