"""Rotary positions in a config.json: `rope_parameters` of transformers 5, `rope_scaling` of 4."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ffn.gpt.config import TransformerConfig
from ffn.interop.hf.keys import KeyPair, Keys, refuse

_SCALED = {"factor", "original_max_position_embeddings"}
ROPE_KEYS = {
    "default": {"original_max_position_embeddings"},
    "linear": {"factor"},
    "llama3": _SCALED | {"low_freq_factor", "high_freq_factor"},
    "yarn": _SCALED | {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"},
}
_ALWAYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}


@dataclass(frozen=True)
class Rope:
    """Rotary positions of one architecture.

    Args:
        base, fraction: the defaults. fraction is None for an architecture that rotates every channel.
        kinds: the supported rope_type values.
        base_key, fraction_key: their names outside the rotary table.
        skips: True for an architecture with no_rope_layers.
    """

    base: float
    fraction: float | None
    kinds: tuple[str, ...]
    base_key: str
    fraction_key: str
    skips: bool

    def read(self, k: Keys) -> dict[str, Any]:
        # as in transformers: rope_scaling wins over rope_parameters, keys inside the table over those outside
        name = "rope_scaling" if k.get("rope_scaling") else "rope_parameters"
        inside = k.get(name) or {}
        if not isinstance(inside, Mapping):
            raise refuse(name, inside, "must be a table of keys")
        kind = _kind(name, inside, self.kinds)
        share = _one_of(k, name, inside, "partial_rotary_factor", self.fraction_key, self.fraction or 1.0)
        if share != 1.0 and self.fraction is None:
            raise refuse("partial_rotary_factor", share, "must be 1.0 in this architecture")
        read = {
            "theta": _one_of(k, name, inside, "rope_theta", self.base_key, self.base),
            "fraction": share,
            "scaling": "linear" if kind == "default" else kind,
        }
        if self.skips:
            read["skip_layers"] = tuple(i for i, rotates in enumerate(rotary_layers(k)) if not rotates)
        if kind == "linear":
            read["factor"] = _number(name, inside, "factor")
        if kind in ("llama3", "yarn"):
            given = [table.get("original_max_position_embeddings") for table in (k, inside)]
            lengths = [length for length in (*given, k["max_position_embeddings"]) if length is not None]
            read["original_seq_len"] = lengths[0]
            read |= (_read_llama3 if kind == "llama3" else _read_yarn)(name, inside, k)
        return {"rotary": read}

    def write(self, c: TransformerConfig) -> dict[str, Any]:
        if c.position != "rotary":
            raise refuse("position", c.position, "must be 'rotary'")
        r = c.rotary
        kind = "default" if r.scaling == "linear" and r.factor == 1.0 else r.scaling
        inside: dict[str, Any] = {"rope_type": kind, "rope_theta": r.theta}
        if self.fraction is not None:
            inside["partial_rotary_factor"] = r.fraction
        if kind != "default":
            inside["factor"] = r.factor
        if kind in ("llama3", "yarn"):
            inside["original_max_position_embeddings"] = r.original_seq_len or c.max_seq_len
        if kind == "llama3":
            inside["low_freq_factor"] = r.low_freq_factor
            inside["high_freq_factor"] = r.high_freq_factor
        if kind == "yarn":
            inside["beta_fast"], inside["beta_slow"] = r.beta_fast, r.beta_slow
            inside["truncate"], inside["attention_factor"] = r.truncate, c.rotary_scaling.amplitude
        keys: dict[str, Any] = {"rope_parameters": inside}
        if self.skips:
            keys["no_rope_layers"] = [int(i not in r.skip_layers) for i in range(c.num_layers)]
        return keys


def rope(
    base: float = 10_000.0,
    *,
    fraction: float | None = None,
    kinds: tuple[str, ...] = tuple(ROPE_KEYS),
    base_key: str = "rope_theta",
    fraction_key: str = "partial_rotary_factor",
    skips: bool = False,
) -> KeyPair:
    """Rotary positions, read and written; see Rope for the arguments."""
    found = Rope(base, fraction, kinds, base_key, fraction_key, skips)
    return KeyPair(found.read, found.write)


def rotary_layers(k: Keys) -> list[int]:
    """Return 1 for each SmolLM3 layer with rotary positions, 0 without: a list, or 0 at a fixed interval."""
    given, every, layers = k["no_rope_layers"], k["no_rope_layer_interval"], k["num_hidden_layers"]
    if given is None:
        if every < 1:
            raise refuse("no_rope_layer_interval", every, "must be a positive integer")
        return [int((i + 1) % every != 0) for i in range(layers)]
    if not isinstance(given, list) or len(given) < layers or not all(value in (0, 1) for value in given):
        raise refuse("no_rope_layers", given, f"must be a list of {layers} 0 (no rotary positions) or 1")
    return given[:layers]


def _kind(name: str, inside: Keys, kinds: tuple[str, ...]) -> str:
    """Return the rope_type; raise unless every other key belongs to it."""
    kind = inside.get("rope_type", inside.get("type", "default"))
    if kind not in kinds:
        raise refuse(f"{name}.rope_type", kind, f"must be one of {', '.join(kinds)}")
    for key, value in inside.items():
        if value is not None and key not in _ALWAYS | ROPE_KEYS[kind]:
            raise refuse(f"{name}.{key}", value, f"is not a key of rope_type {kind!r}", "leave it out")
    return kind


def _one_of(k: Keys, name: str, inside: Keys, key: str, beside: str, default: float) -> float:
    """Return a number from inside the rotary table, or from outside under one of two names."""
    if inside.get(key) is not None:
        return _number(name, inside, key)
    given = {other: k[other] for other in (beside, key) if k.get(other) is not None}
    if any(value != k[next(iter(given))] for value in given.values()):
        raise refuse(key, k[key], f"must equal {beside}={given[beside]}", "leave one of them out")
    return next((_checked(name, value) for name, value in given.items()), default)


def _number(name: str, inside: Keys, key: str, default: float | None = None) -> float:
    value = inside.get(key)
    return _checked(f"{name}.{key}", default if value is None else value)


def _checked(key: str, value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1e38:
        raise refuse(key, value, "must be a number, 0 or more")
    return float(value)


def _read_llama3(name: str, inside: Keys, k: Keys) -> dict[str, Any]:
    return {key: _number(name, inside, key) for key in ("factor", "low_freq_factor", "high_freq_factor")}


def _read_yarn(name: str, inside: Keys, k: Keys) -> dict[str, Any]:
    if inside.get("truncate") not in (None, True, False):
        raise refuse(f"{name}.truncate", inside["truncate"], "must be true or false")
    if inside.get("factor") is None:
        original = _number(name, inside, "original_max_position_embeddings", k["max_position_embeddings"])
        factor = k["max_position_embeddings"] / (original or math.inf)
    else:
        factor = _number(name, inside, "factor")
    amplitude = None
    if inside.get("attention_factor") is not None:
        amplitude = _number(name, inside, "attention_factor")
    elif inside.get("mscale") and inside.get("mscale_all_dim"):
        above, below = (_number(name, inside, key) for key in ("mscale", "mscale_all_dim"))
        grown = math.log(factor) if factor > 1 else 0.0
        amplitude = (0.1 * above * grown + 1.0) / (0.1 * below * grown + 1.0)
    return {
        "factor": factor,
        "beta_fast": _number(name, inside, "beta_fast", 32.0) or 32.0,
        "beta_slow": _number(name, inside, "beta_slow", 1.0) or 1.0,
        "truncate": inside.get("truncate") is not False,
        "attention_factor": amplitude,
    }
