"""TransformerConfig: derived fields, TOML both ways, wrong values."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from ffn.files.dataclass_toml import apply_overrides
from ffn.gpt.config import RotaryConfig, TransformerConfig
from ffn.nn.rotary import Interpolation, Llama3, Yarn
from tests.models import SMALL, variants


def test_sizes_left_out_follow_from_the_others() -> None:
    assert (SMALL.kv_heads, SMALL.head_channels, SMALL.hidden_width) == (4, 4, 24)
    wide = dataclasses.replace(SMALL, hidden_dim=None, num_kv_heads=2, head_dim=10)
    assert (wide.kv_heads, wide.head_channels, wide.hidden_width) == (2, 10, 128)
    assert dataclasses.replace(wide, activation="relu").hidden_width == 64


@variants
def test_toml_both_ways(options: dict) -> None:
    config = dataclasses.replace(SMALL, **options)
    assert TransformerConfig.from_toml(config.to_toml()) == config
    assert TransformerConfig.from_dict(dataclasses.asdict(config)) == config


def test_keys_absent_from_toml_have_their_defaults() -> None:
    text = "vocab_size = 13\ndim = 16\nnum_layers = 2\nnum_heads = 4\nhidden_dim = 24\nmax_seq_len = 12"
    assert TransformerConfig.from_toml(text) == SMALL


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"n_layer": 2}, r"^model\.n_layer\b.*model\.num_layers"),
        ({"position": "rotery"}, r"^model\.position\b.*rotary\?$"),
        ({"dim": "wide"}, r"^model\.dim"),
        ({"dim": 15}, r"\bdim\b.*num_heads"),
        ({"num_kv_heads": 3}, "num_kv_heads"),
        ({"head_dim": 5}, r"^model\.head_dim"),
        ({"num_layers": 0}, r"^model\.num_layers"),
        ({"dropout": 1.0}, r"^model\.dropout"),
        ({"activation": "swigloo"}, r"^model\.activation"),
        ({"init": "orthogonal"}, r"^model\.init"),
        ({"chunk_tokens": 5}, r"\bchunk_tokens\b"),
        ({"save": "input", "chunk_tokens": 0}, r"^model\.chunk_tokens"),
        ({"sliding_window": 0}, r"^model\.sliding_window"),
        ({"sliding_window": 3, "causal": False}, r"^model\.sliding_window"),
        ({"full_attention_layers": (2,)}, r"^model\.full_attention_layers"),
        ({"attention_softcap": -1.0}, r"^model\.attention_softcap"),
        ({"norm_position": "output", "parallel": True}, "norm_position"),
        ({"shared_norm": False}, r"^model\.shared_norm"),
        ({"head": "mlm", "head_activation": "swiglu"}, r"^model\.head_activation"),
        ({"position_offset": -1}, r"^model\.position_offset"),
        ({"position_offset": 1}, r"^model\.position_offset"),
        ({"pad_token_id": 1}, r"^model\.pad_token_id"),
        ({"num_token_types": -1}, r"^model\.num_token_types"),
        ({"rotary": 3}, r"^model\.rotary"),
        ({"rotary": {"base": 3.0}}, r"^model\.rotary\.base"),
        ({"rotary": {"skip_layers": (-1,)}}, r"^model\.rotary\.skip_layers"),
        ({"rotary": {"skip_layers": ("first",)}}, r"^model\.rotary\.skip_layers"),
        ({"rotary": {"theta": 0.0}}, r"^model\.rotary\.theta"),
        ({"rotary": {"fraction": 0.75}}, r"^model\.rotary\.fraction"),
        ({"rotary": {"fraction": 0.1}}, r"^model\.rotary\.fraction"),
        ({"rotary": {"fraction": 1.5}}, r"^model\.rotary\.fraction"),
        ({"rotary": {"scaling": "llama3", "low_freq_factor": 4.0}}, r"^model\.rotary\.low_freq_factor"),
        ({"rotary": {"scaling": "yarn", "theta": 1.0}}, r"^model\.rotary\.theta"),
    ],
    ids=str,
)
def test_a_wrong_value_is_refused_by_its_dotted_name(options: dict, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        TransformerConfig.from_dict({**dataclasses.asdict(SMALL), **options})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("vocab_size", 1.5),
        ("vocab_size", "50"),
        ("num_layers", True),
        ("causal", "yes"),
        ("activation", torch.nn.ReLU),
        ("logit_softcap", float("inf")),
        ("position", "rope"),
        ("rotary", {"theta": 500.0}),
    ],
)
def test_a_value_of_another_type_is_refused_at_once(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{name}"):
        dataclasses.replace(SMALL, **{name: value})


def test_equivalent_values_are_converted_and_read_again() -> None:
    numbers = {"vocab_size": np.int64(50), "dropout": np.float64(0.1), "norm_eps": 1}
    config = dataclasses.replace(SMALL, **numbers, full_attention_layers=[0])
    assert config == dataclasses.replace(
        SMALL, vocab_size=50, dropout=0.1, norm_eps=1.0, full_attention_layers=(0,)
    )
    assert TransformerConfig.from_toml(config.to_toml()) == config


def test_command_line_words_reach_the_rotary_table() -> None:
    config = apply_overrides(SMALL, ["rotary.theta=500", "rotary.scaling=yarn", "rotary.skip_layers=[1]"])
    assert config.rotary == RotaryConfig(theta=500.0, scaling="yarn", skip_layers=(1,))
    assert dataclasses.replace(config, rotary=SMALL.rotary) == SMALL


def test_config_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SMALL.dim = 3  # pyright: ignore[reportAttributeAccessIssue]


def test_derived_fields() -> None:
    config = dataclasses.replace(SMALL, bias=True, rotary=RotaryConfig(fraction=0.5), sliding_window=3)
    assert (config.out_bias, config.rotary_channels) == (True, 2)
    assert not dataclasses.replace(config, attention_out_bias=False).out_bias
    config = dataclasses.replace(config, full_attention_layers=(1,))
    assert [config.window(layer) for layer in range(2)] == [3, None]


def test_rotary_scaling_has_the_options_of_its_kind() -> None:
    assert RotaryConfig(factor=2.0).scaled_to(12) == Interpolation(2.0)
    llama3 = RotaryConfig(scaling="llama3", factor=2.0, high_freq_factor=3.0)
    assert llama3.scaled_to(12) == Llama3(2.0, original=12, low=1.0, high=3.0)
    yarn = RotaryConfig(scaling="yarn", factor=2.0, original_seq_len=6)
    assert yarn.scaled_to(12) == Yarn(2.0, original=6, amplitude=0.1 * math.log(2.0) + 1.0)
    given = dataclasses.replace(yarn, attention_factor=1.5, beta_fast=9.0, truncate=False)
    assert dataclasses.replace(SMALL, rotary=given).rotary_scaling == Yarn(2.0, 6, 1.5, fast=9.0, whole=False)
