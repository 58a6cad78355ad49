"""TransformerConfig: what follows from it, TOML both ways, and what it refuses."""

import dataclasses

import pytest

from ffn.transformer import TransformerConfig
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
        ({"dim": 15}, "dim=15 does not split into num_heads=4 heads"),
        ({"num_kv_heads": 3}, "num_heads=4 is no multiple of num_kv_heads=3"),
        ({"head_dim": 5}, "position='rotary' turns pairs of channels, but head_dim=5 is odd; choose an even"),
        ({"num_layers": 0}, "num_layers=0: want a positive number"),
        ({"dropout": 1.0}, r"dropout=1.0: want a probability in \[0, 1\)"),
        ({"activation": "swigloo"}, "activation='swigloo': no such row"),
        ({"init": "orthogonal"}, "init='orthogonal': no such initialisation"),
        ({"chunk_tokens": 5}, "^model.chunk_tokens=5 with save='preact': want at least 1 and save='input'$"),
        ({"save": "input", "chunk_tokens": 0}, "chunk_tokens=0: want a positive number"),
    ],
)
def test_config_refuses(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TransformerConfig.from_dict({**dataclasses.asdict(SMALL), **options})


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
    with pytest.raises(ValueError, match=f"^{field}={wrong!r}: want one of {choices}$"):
        dataclasses.replace(SMALL, **{field: wrong})


def test_config_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SMALL.dim = 3  # pyright: ignore[reportAttributeAccessIssue]
