"""TransformerConfig: what follows from it, TOML both ways, and what it refuses."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from ffn.gpt.transformer import TransformerConfig
from ffn.nn.rotary import Interpolation, Llama3, Yarn
from tests.models import SMALL, variants


def test_config_derives_what_is_left_out() -> None:
    assert (SMALL.kv_heads, SMALL.head_channels, SMALL.hidden_width) == (4, 4, 24)
    wide = dataclasses.replace(SMALL, hidden_dim=None, num_kv_heads=2, head_dim=10)
    assert (wide.kv_heads, wide.head_channels, wide.hidden_width) == (2, 10, 128)
    assert dataclasses.replace(wide, activation="relu").hidden_width == 64


@variants
def test_toml_both_ways(options: dict) -> None:
    config = dataclasses.replace(SMALL, **options)
    assert TransformerConfig.from_toml(config.to_toml()) == config
    assert TransformerConfig.from_dict(dataclasses.asdict(config)) == config


def test_toml_takes_defaults_for_what_is_left_out() -> None:
    text = "vocab_size = 13\ndim = 16\nnum_layers = 2\nnum_heads = 4\nhidden_dim = 24\nmax_seq_len = 12"
    assert TransformerConfig.from_toml(text) == SMALL


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_layer": 2}, r"^model.n_layer: no such key; did you mean model.num_layers\?$"),
        ({"position": "rotery"}, r"model.position: wants one of .*; did you mean rotary\?"),
        ({"dim": "wide"}, "model.dim: wants a whole number; got 'wide'"),
        ({"dim": 15}, "dim"),
        ({"num_kv_heads": 3}, "num_heads"),
        ({"head_dim": 5}, "position='rotary' turns pairs of channels, but head_dim=5 is odd; choose an even"),
        ({"num_layers": 0}, "num_layers=0: want a positive whole number"),
        ({"dropout": 1.0}, r"dropout=1.0: want a probability in \[0, 1\)"),
        ({"activation": "swigloo"}, "activation"),
        ({"init": "orthogonal"}, "init"),
        ({"chunk_tokens": 5}, "^model.chunk_tokens=5 with save='preact': want save='input'$"),
        ({"save": "input", "chunk_tokens": 0}, "chunk_tokens=0: want a positive whole number"),
        ({"sliding_window": 0}, "sliding_window=0: want a positive whole number"),
        ({"sliding_window": 3, "causal": False}, "sliding_window=3 with causal=False: leave one of them out"),
        ({"full_attention_layers": (2,)}, r"full_attention_layers=\(2,\): want layers from 0 to 1"),
        ({"no_rope_layers": (-1,)}, r"no_rope_layers=\(-1,\): want layers from 0 to 1"),
        ({"no_rope_layers": ("first",)}, "no_rope_layers: wants a whole number; got 'first'"),
        ({"attention_softcap": -1.0}, "attention_softcap=-1.0: want a positive number"),
        ({"rope_fraction": 0.75}, "rope_fraction=0.75 of head_dim=4 leaves 3 channels: want an even number"),
        ({"rope_fraction": 0.1}, "rope_fraction=0.1 of head_dim=4 leaves 0 channels: want an even number"),
        ({"rope_fraction": 1.5}, "rope_fraction=1.5: want a share up to 1"),
        ({"rope_type": "llama3", "rope_low_freq_factor": 4.0}, "rope_low_freq_factor=4.0: want less than"),
        ({"rope_type": "yarn", "rope_base": 1.0}, "rope_base=1.0 with rope_type='yarn': all channels turn"),
        ({"norm_position": "output", "parallel": True}, "norm_position"),
        ({"shared_norm": False}, "shared_norm"),
        ({"head": "mlm", "head_activation": "swiglu"}, "head_activation"),
        ({"position_offset": -1}, "position_offset=-1: want 0 or more"),
        ({"position_offset": 1}, "position_offset=1: want position='learned'"),
        ({"pad_token_id": 1}, r"pad_token_id=1 wants an encoder \(causal=False\) with learned positions"),
        ({"num_token_types": -1}, "num_token_types=-1: want 0 or more"),
    ],
)
def test_config_refuses(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TransformerConfig.from_dict({**dataclasses.asdict(SMALL), **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 1.5}, "vocab_size: wants a whole number; got 1.5"),
        ({"vocab_size": "50"}, "vocab_size: wants a whole number; got '50'"),
        ({"num_layers": True}, "num_layers: wants a whole number; got True"),
        ({"causal": "yes"}, "causal: wants true or false; got 'yes'"),
        ({"activation": torch.nn.ReLU}, "activation: wants a string; got <class 'torch.nn"),
        ({"logit_softcap": float("inf")}, "logit_softcap=inf: want a positive number"),
    ],
)
def test_a_value_of_another_type_is_refused_at_once(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        dataclasses.replace(SMALL, **options)


def test_what_means_the_same_is_written_and_read_again() -> None:
    numbers = {"vocab_size": np.int64(50), "dropout": np.float64(0.1), "rope_base": 500}
    config = dataclasses.replace(SMALL, **numbers, full_attention_layers=[0])
    assert config == dataclasses.replace(
        SMALL, vocab_size=50, dropout=0.1, rope_base=500.0, full_attention_layers=(0,)
    )
    assert TransformerConfig.from_toml(config.to_toml()) == config


@pytest.mark.parametrize(
    ("field", "wrong", "choices"),
    [
        ("position", "rope", "rotary, learned, none"),
        ("norm", "rms", "rmsnorm, layernorm, rmsnorm1p"),
        ("norm_position", "middle", "pre, post, output, sandwich"),
        ("save", "nothing", "preact, input"),
    ],
)
def test_a_choice_that_is_none(field: str, wrong: str, choices: str) -> None:
    with pytest.raises(ValueError, match=f"^{field}: wants one of {choices}; got {wrong!r}"):
        dataclasses.replace(SMALL, **{field: wrong})


def test_config_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SMALL.dim = 3  # pyright: ignore[reportAttributeAccessIssue]


def test_defaults_that_follow() -> None:
    config = dataclasses.replace(SMALL, bias=True, rope_fraction=0.5, sliding_window=3)
    assert (config.out_bias, config.rope_channels) == (True, 2)
    assert not dataclasses.replace(config, attention_out_bias=False).out_bias
    config = dataclasses.replace(config, full_attention_layers=(1,))
    assert [config.window(layer) for layer in range(2)] == [3, None]


def test_how_rotary_frequencies_stretch() -> None:
    assert dataclasses.replace(SMALL, rope_scaling=2.0).rotary_scaling == Interpolation(2.0)
    llama3 = dataclasses.replace(SMALL, rope_type="llama3", rope_scaling=2.0, rope_high_freq_factor=3.0)
    assert llama3.rotary_scaling == Llama3(2.0, original=12, low=1.0, high=3.0)
    yarn = dataclasses.replace(SMALL, rope_type="yarn", rope_scaling=2.0, rope_original_seq_len=6)
    assert yarn.rotary_scaling == Yarn(2.0, original=6, amplitude=0.1 * math.log(2.0) + 1.0)
    given = dataclasses.replace(yarn, rope_attention_factor=1.5, rope_beta_fast=9.0, rope_truncate=False)
    assert given.rotary_scaling == Yarn(2.0, 6, 1.5, fast=9.0, whole=False)
