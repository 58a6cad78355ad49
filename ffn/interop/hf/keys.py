"""What takes several keys of a config.json, or a rule, to say: each a pair of functions, there and back.

`read` makes fields of TransformerConfig from the keys, where those that are absent have their architecture's
default; `write` makes keys from a TransformerConfig. What only a part of the fields can be written is no
concern here: `write_config` reads back what it wrote.
"""

import struct
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ffn import activations
from ffn.gpt.config import TransformerConfig

Keys = Mapping[str, Any]


class Part(NamedTuple):
    """read: their keys -> our fields. write: our config -> their keys."""

    read: Callable[[Keys], dict[str, Any]]
    write: Callable[[TransformerConfig], dict[str, Any]]


def refuse(key: str, value: Any, why: str) -> ValueError:
    """The error for a key, in one line however the value is written."""
    shown = repr(value)
    return ValueError(f"{key}={shown if len(shown) < 80 else shown[:77] + '...'}: {why}")


# --- activations

_NOT_THEIRS = ("gelu_tanh", "identity", "softplus")  # our rows that have no such name there
_GATED = {gate: name for name, gate in activations.GATES.items()}
PLAIN = {  # their name -> our activation; where several have one meaning, the first is written
    theirs: activations.resolve(theirs).name
    for theirs in (*(row.name for row in activations.PLAIN), *activations.ALIASES)
    if theirs not in _NOT_THEIRS
}
GATED = {theirs: _GATED[ours] for theirs, ours in PLAIN.items() if ours in _GATED}


def activation(key: str, table: Mapping[str, str], *, head: bool = False) -> Part:
    """The feed-forward's activation under `key`; with head, the masked-language head has it too."""

    def read(k: Keys) -> dict[str, Any]:
        if k[key] not in table:
            raise refuse(key, k[key], f"no such activation here; there are {', '.join(table)}")
        ours = table[k[key]]
        return {"activation": ours, "head_activation": ours} if head else {"activation": ours}

    def write(c: TransformerConfig) -> dict[str, Any]:
        theirs = [name for name, ours in table.items() if ours == c.activation]
        if not theirs:
            raise refuse("activation", c.activation, f"{key} has no name for it")
        return {key: theirs[0]}

    return Part(read, write)


# --- sliding windows

FULL, SLIDING = "full_attention", "sliding_attention"


def windows(slides: Callable[[Keys, int], bool] | None = None, switch: str | None = None) -> Part:
    """`sliding_window` in the layers that `layer_types` names, or where the architecture has it otherwise.

    Args:
        slides: whether a layer has the window where `layer_types` is absent; None for an architecture that
            has it in all layers and knows no `layer_types`.
        switch: the key without which there is no window.
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
            raise refuse("layer_types", types, f"want {len(usual)} of {FULL} and {SLIDING}")
        if types != usual and (slides is None or not on):
            raise refuse("layer_types", types, f"with sliding_window={window} here all layers are {usual[0]}")
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

    return Part(read, write)


# --- smaller things


def _read_scalar(k: Keys) -> dict[str, Any]:
    scalar = k["query_pre_attn_scalar"]
    if not scalar:
        raise refuse("query_pre_attn_scalar", scalar, "want a positive number")
    return {"attention_scale": scalar**-0.5}


def _write_scalar(c: TransformerConfig) -> dict[str, Any]:
    scale = c.attention_scale or c.head_channels**-0.5
    return {"query_pre_attn_scalar": max(round(max(scale, 1e-8) ** -2), 1)}  # whole numbers there


QUERY_SCALAR = Part(_read_scalar, _write_scalar)

ATTENTION_BIAS = Part(
    lambda k: {"attention_bias": k["attention_bias"], "attention_out_bias": k["attention_bias"]},
    lambda c: {"attention_bias": c.attention_bias},
)
EMBEDDING_SCALE = Part(  # kept in float32 there, whatever the model's dtype
    lambda k: {"embedding_scale": struct.unpack("f", struct.pack("f", k["hidden_size"] ** 0.5))[0]},
    lambda c: {},
)
SCALE_SWITCH = Part(
    lambda k: {"attention_scale": None if k["scale_attn_weights"] else 1.0},
    lambda c: {"scale_attn_weights": c.attention_scale != 1.0},
)
NORM_EACH = Part(  # a parallel block of GPT-NeoX has two norms
    lambda k: {"shared_norm": not k["use_parallel_residual"]},
    lambda c: {},
)


POSITIONS_AFTER_PAD = Part(
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


def dropout(*keys: str) -> Part:
    """One probability under several keys, which ours does not tell apart."""

    def read(k: Keys) -> dict[str, Any]:
        values = {key: k[key] for key in keys}
        if len(set(values.values())) > 1:
            said = ", ".join(f"{key}={value}" for key, value in values.items())
            raise ValueError(
                f"{said}: ffn has one dropout for them; make them equal (it acts in training only)"
            )
        return {"dropout": values[keys[0]]}

    return Part(read, lambda c: dict.fromkeys(keys, c.dropout))
