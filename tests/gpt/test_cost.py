"""Costs equal hand counts, counts of the built model, and torch's FLOP counter."""

import dataclasses
import re

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ffn.gpt.cost import flops_per_token, kept_elements, parameter_table, render_kept, render_table
from ffn.gpt.transformer import Transformer, TransformerConfig

GPT2 = TransformerConfig(
    vocab_size=50257, dim=768, num_layers=12, num_heads=12, max_seq_len=1024, activation="gelu_tanh",
    bias=True, attention_bias=True, position="learned", norm="layernorm",
)  # fmt: skip
LLAMA = TransformerConfig(
    vocab_size=128256, dim=4096, num_layers=32, num_heads=32, num_kv_heads=8, hidden_dim=14336,
    max_seq_len=8192, tie_embeddings=False,
)  # fmt: skip
SMALL = TransformerConfig(vocab_size=65, dim=32, num_layers=3, num_heads=4, hidden_dim=80, max_seq_len=24)
OPTIONS = [
    {},
    {"num_kv_heads": 2, "head_dim": 12, "qk_norm": True},
    {"bias": True, "attention_bias": True, "activation": "gelu", "norm": "layernorm"},
    {"position": "learned", "tie_embeddings": False, "hidden_dim": None},
    {"norm_position": "post", "causal": False, "position": "none"},
    {"parallel": True, "norm": "layernorm"},
    {"parallel": True, "norm_position": "post"},
    {"parallel": True, "shared_norm": False, "attention_out_bias": True},
    {"qk_norm": True, "qk_norm_scope": "all", "num_kv_heads": 2, "norm_position": "output"},
    {"norm_position": "sandwich", "norm": "rmsnorm1p"},
    {
        "position": "learned",
        "position_offset": 2,
        "num_token_types": 3,
        "embedding_norm": True,
        "head": "mlm",
    },
    {"head": "none"},
]


def parameters(config: TransformerConfig) -> int:
    return sum(part.parameters for part in parameter_table(config))


def test_known_models_have_their_number_of_parameters() -> None:
    assert parameters(GPT2) == 124_439_808
    assert parameters(LLAMA) == 8_030_261_248


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_parameters_equal_the_built_models(options: dict) -> None:
    config = dataclasses.replace(SMALL, **options)
    model = Transformer(config, device="meta")
    assert parameters(config) == model.num_parameters()
    counts = {part.name: part.parameters for part in parameter_table(config)}
    blocks = [dict(block.named_parameters()) for block in model.blocks]
    by_name = lambda word: sum(p.numel() for b in blocks for name, p in b.items() if word in name)  # noqa: E731
    assert counts["feed-forward"] == by_name("feed_forward.")
    assert counts["attention output"] == by_name("o_proj")
    assert counts["q, k, v"] == by_name("q_proj") + by_name("k_proj") + by_name("v_proj")
    assert counts["q/k norm"] == by_name("q_norm") + by_name("k_norm")


def test_flops_equal_a_count_by_hand() -> None:
    config = dataclasses.replace(SMALL, num_kv_heads=2)
    D, H, V, L, C, T = 32, 80, 65, 3, 8, 10
    qkv, out = 2 * D * (4 + 2 + 2) * C, 2 * 4 * C * D
    pairs = sum(t + 1 for t in range(T))  # of a token and a key that it attends to
    attention = 2 * 2 * pairs * 4 * C
    whole = T * (L * (qkv + out + 2 * 3 * D * H) + 2 * D * V) + L * attention
    assert flops_per_token(config, T) * T == whole
    assert flops_per_token(config, T, training=True) == 3 * flops_per_token(config, T)
    assert flops_per_token(config) == flops_per_token(config, 24)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_flops_equal_torchs_count(options: dict) -> None:
    config = dataclasses.replace(SMALL, **{**options, "causal": False})
    model, tokens = Transformer(config), torch.zeros(2, 10, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(tokens)
    assert counter.get_total_flops() == 20 * flops_per_token(config, 10)


def test_a_window_costs_fewer_keys() -> None:
    config = dataclasses.replace(SMALL, sliding_window=4, full_attention_layers=(1,))
    attention = next(part.flops for part in parameter_table(config, 10) if part.name == "attention")
    pairs = [sum(min(t + 1, window) for t in range(10)) for window in (4, 10, 4)]
    assert attention == 2 * 2 * sum(pairs) * SMALL.num_heads * SMALL.head_channels // 10


def test_the_table_is_aligned_and_adds_up() -> None:
    text = render_table(GPT2, 512)
    lines = text.splitlines()
    assert lines[0].split() == ["part", "parameters", "FLOPs", "per", "token"]
    assert lines[-1] == "forward, in a sequence of 512 tokens"
    assert lines[-2].split() == [
        "total",
        "124,439,808",
        "100.0%",
        f"{flops_per_token(GPT2, 512):,}",
        "100.0%",
    ]
    assert "q/k norm" not in text
    assert all(line == line.rstrip() for line in lines)
    assert len({len(line) for line in lines[2:-3]}) == 1


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("save", ["preact", "input"])
def test_saved_elements_equal_those_the_blocks_explain(activation: str, save: str) -> None:
    config = dataclasses.replace(SMALL, activation=activation, save=save)
    model = Transformer(config)
    said = [block.feed_forward.explain(torch.zeros(1, config.dim)) for block in model.blocks]
    assert kept_elements(config, save) % config.num_layers == 0
    each = kept_elements(config, save) // config.num_layers
    assert all(re.search(rf"\b{each} elements\b", line) for line in said)


def test_saved_bytes_follow_from_saved_elements() -> None:
    lines = [line.split() for line in render_kept(LLAMA).splitlines()]
    elements = 32 * (4096 + 2 * 14336)
    size = f"{4 * elements * 8192 / 2**20:,.1f}"
    assert lines[1] == ['save="preact"', "float32", f"{4 * elements:,}", "bytes", size, "MiB"]
    assert lines[4] == ['save="input"', "bfloat16", f"{2 * 32 * 4096:,}", "bytes", "2,048.0", "MiB"]
    assert len({len(line) for line in render_kept(LLAMA).splitlines()}) == 1
