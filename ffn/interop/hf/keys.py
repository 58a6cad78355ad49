"""Parts of a config.json that take several keys or a rule: pairs of functions that read and write them.

`read` turns keys into fields of TransformerConfig; absent keys have their architecture's default. `write`
turns a TransformerConfig into keys. It does not check that they express every field: `write_config` reads
back its own output.
"""

import struct
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ffn import activations
from ffn.files.strict_json import short
from ffn.gpt.config import TransformerConfig

Keys = Mapping[str, Any]


class KeyPair(NamedTuple):
    """A pair of functions. read: their keys -> our fields. write: our config -> their keys."""

    read: Callable[[Keys], dict[str, Any]]
    write: Callable[[TransformerConfig], dict[str, Any]]


def refuse(key: str, value: Any, rule: str, remedy: str = "") -> ValueError:
    """Return the error for a key: one line, whatever the value."""
    return ValueError(f"{key} {rule}, got {short(value)}{remedy and f'; {remedy}'}")


# --- activations

_NOT_THEIRS = ("gelu_tanh", "identity", "softplus")  # our names that transformers does not have
_GATED = {gate: name for name, gate in activations.GATES.items()}
PLAIN = {  # their name -> our activation; of several names for one, the first is written
    theirs: activations.resolve(theirs).name
    for theirs in (*(row.name for row in activations.PLAIN), *activations.ALIASES)
    if theirs not in _NOT_THEIRS
}
GATED = {theirs: _GATED[ours] for theirs, ours in PLAIN.items() if ours in _GATED}


def activation(key: str, table: Mapping[str, str], *, head: bool = False) -> KeyPair:
    """The feed-forward activation under `key`; with head, also that of the masked-language head."""

    def read(k: Keys) -> dict[str, Any]:
        if k[key] not in table:
            raise refuse(key, k[key], f"must be one of {', '.join(table)}")
        ours = table[k[key]]
        return {"activation": ours, "head_activation": ours} if head else {"activation": ours}

    def write(c: TransformerConfig) -> dict[str, Any]:
        theirs = [name for name, ours in table.items() if ours == c.activation]
        if not theirs:
            known = ", ".join(dict.fromkeys(table.values()))
            raise refuse("activation", c.activation, f"must be one of {known} to be written as {key}")
        return {key: theirs[0]}

    return KeyPair(read, write)


# --- sliding windows

FULL, SLIDING = "full_attention", "sliding_attention"


def windows(slides: Callable[[Keys, int], bool] | None = None, switch: str | None = None) -> KeyPair:
    """`sliding_window`, and `layer_types` for the layers that have it.

    Args:
        slides: returns True if a layer has the window when `layer_types` is absent. None for an architecture
            without `layer_types`: all its layers have the window.
        switch: the key that has to be true for there to be a window.
    """

    def read(k: Keys) -> dict[str, Any]:
        window, types, layers = k["sliding_window"], k.get("layer_types"), range(k["num_hidden_layers"])
        on = window is not None and (switch is None or k[switch])
        usual = [SLIDING if on and (slides is None or slides(k, i)) else FULL for i in layers]
        types = usual if types is None else types
        if (
            not isinstance(types, list)
            or len(types) != len(usual)
            or any(t not in (FULL, SLIDING) for t in types)
        ):
            raise refuse("layer_types", types, f"must be a list of {len(usual)} {FULL} or {SLIDING}")
        if types != usual and (slides is None or not on):
            raise refuse("layer_types", types, f"must be all {usual[0]} with sliding_window={window}")
        if SLIDING not in types:
            return {}
        full = tuple(i for i in layers if types[i] == FULL)
        return {"sliding_window": window, "full_attention_layers": full}

    def write(c: TransformerConfig) -> dict[str, Any]:
        keys: dict[str, Any] = {"sliding_window": c.sliding_window}
        if switch is not None:
            keys[switch] = c.sliding_window is not None
        if slides is not None:
            keys["layer_types"] = [FULL if c.window(i) is None else SLIDING for i in range(c.num_layers)]
        return keys

    return KeyPair(read, write)


# --- single values


def _read_scalar(k: Keys) -> dict[str, Any]:
    scalar = k["query_pre_attn_scalar"]
    if not scalar:
        raise refuse("query_pre_attn_scalar", scalar, "must be a positive number")
    return {"attention_scale": scalar**-0.5}


def _write_scalar(c: TransformerConfig) -> dict[str, Any]:
    scale = c.attention_scale or c.head_channels**-0.5
    return {"query_pre_attn_scalar": max(round(max(scale, 1e-8) ** -2), 1)}  # an integer in config.json


QUERY_SCALAR = KeyPair(_read_scalar, _write_scalar)

ATTENTION_BIAS = KeyPair(
    lambda k: {"attention_bias": k["attention_bias"], "attention_out_bias": k["attention_bias"]},
    lambda c: {"attention_bias": c.attention_bias},
)
EMBEDDING_SCALE = KeyPair(  # transformers keeps it in float32, whatever the model's dtype
    lambda k: {"embedding_scale": struct.unpack("f", struct.pack("f", k["hidden_size"] ** 0.5))[0]},
    lambda c: {},
)
SCALE_SWITCH = KeyPair(
    lambda k: {"attention_scale": None if k["scale_attn_weights"] else 1.0},
    lambda c: {"scale_attn_weights": c.attention_scale != 1.0},
)
NORM_EACH = KeyPair(  # a parallel block of GPT-NeoX has two norms
    lambda k: {"shared_norm": not k["use_parallel_residual"]},
    lambda c: {},
)


POSITIONS_AFTER_PAD = KeyPair(
    lambda k: {
        "pad_token_id": k["pad_token_id"],
        "position_offset": k["pad_token_id"] + 1,
        "max_seq_len": k["max_position_embeddings"] - k["pad_token_id"] - 1,
    },
    lambda c: {
        "pad_token_id": c.pad_token_id,
        "max_position_embeddings": c.max_seq_len + c.position_offset,
    },
)


def dropout(*keys: str) -> KeyPair:
    """One probability for several keys."""

    def read(k: Keys) -> dict[str, Any]:
        values = {key: k[key] for key in keys}
        if len(set(values.values())) > 1:
            given = ", ".join(map(str, values.values()))
            raise ValueError(f"{' and '.join(keys)} must be equal, got {given}; ffn has one dropout for them")
        return {"dropout": values[keys[0]]}

    return KeyPair(read, lambda c: dict.fromkeys(keys, c.dropout))
