"""Dataclasses as configuration: mappings, TOML text and `key=value` words, both ways.

A configuration is a frozen dataclass. A field is a `bool`, `int`, `float`, `str`, a `Literal` of strings, an
optional one of these, a tuple of one of these, or another such dataclass (a TOML table). TOML has no null:
`None` is written and read as the string "none".

Every error is a `ValueError` of one line that starts with the dotted key at fault. A dataclass raises
`ValueError` in its own `__post_init__`, with a message that starts with the name of the field.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import numbers
import os
import tomllib
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar

Config = TypeVar("Config")


def from_dict(
    cls: type[Config], mapping: Mapping[str, Any], prefix: str = "", base: Config | None = None
) -> Config:
    """Build `cls` from nested mappings.

    Args:
        prefix: the dotted name of `cls` inside the whole, for messages: `from_dict(Model, m, "model")` raises
            `model.n_layer is not a key; did you mean model.num_layers?`.
        base: gives the values of absent keys; left out, the fields' defaults do.
    """
    hints = _hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    values = {}
    for name, value in mapping.items():
        key = _join(prefix, name)
        if name not in fields:
            raise ValueError(f"{key} is not a key; {_suggestion(name, value, cls, prefix)}")
        hint = hints[name]
        if dataclasses.is_dataclass(hint):
            if isinstance(value, _Word):
                value = _parse_word(value, hint)
            if not isinstance(value, Mapping):
                raise ValueError(
                    f"{key} must be a table of keys such as {key}.{next(_leaves(hint))}, got {value!r}"
                )
            inner = getattr(base, name) if base is not None else _default(fields[name])
            values[name] = from_dict(typing.cast(type, hint), value, key, inner)
        else:
            values[name] = _coerce(value, hint, key)
    for name, field in fields.items():
        if base is None and name not in values and not _has_default(field):
            raise ValueError(f"{_join(prefix, name)} is missing and has no default")
    try:
        return cls(**values) if base is None else dataclasses.replace(base, **values)  # type: ignore[type-var]
    except ValueError as error:  # the message starts with the field's name
        raise ValueError(_join(prefix, str(error))) from None


def settle(config: Any) -> None:
    """Convert each field of a new configuration to its declared type; call it first in `__post_init__`.

    NumPy numbers, an integer for a float, a list for a tuple and a path for a string are converted, so that
    every configuration can be written and read again.

    Raises:
        ValueError: a value has another type or is not one of a field's choices.
    """
    for name, hint in _hints(type(config)).items():
        value = getattr(config, name)
        if not dataclasses.is_dataclass(hint):
            object.__setattr__(config, name, _coerce(value, hint, name))
        elif not isinstance(value, typing.cast(type, hint)):
            raise ValueError(f"{name} must be a {typing.cast(type, hint).__name__}, got {value!r}")


def from_toml(cls: type[Config], text: str, base: Config | None = None) -> Config:
    """Read TOML text into `cls`; see `from_dict`."""
    try:
        mapping = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"not TOML: {error}") from None
    return from_dict(cls, mapping, base=base)


def read_config(config: Config, file: str | Path | None, words: Iterable[str]) -> Config:
    """Return `config` changed by a TOML file, then by words such as `train.steps=100`."""
    if file is not None:
        try:
            config = from_toml(type(config), Path(file).read_text("utf-8"), base=config)
        except OSError as error:
            raise ValueError(f"{file}: cannot read this config: {error.strerror}") from None
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None
    return apply_overrides(config, words)


def to_dict(config: Any) -> dict[str, Any]:
    """Return nested dictionaries of TOML values for `from_dict`: None is "none", a tuple is a list."""
    out = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            out[field.name] = to_dict(value)
        elif isinstance(value, tuple):
            out[field.name] = list(value)
        else:
            out[field.name] = "none" if value is None else value
    return out


def to_toml(config: Any) -> str:
    """Return the whole configuration as TOML text, one line per key, in the order of the fields."""
    return "\n".join(_toml_lines(to_dict(config), "")) + "\n"


def apply_overrides(config: Config, words: Iterable[str]) -> Config:
    """Return `config` changed by words such as `train.lr=0.01`, `data.path=a b.txt`, `betas=[0.9, 0.95]`."""
    mapping: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise ValueError(f"{word} must be key=value, as in train.steps=100")
        *path, name = key.strip().split(".")
        table = mapping
        for part in path:
            table = table.setdefault(part, {})
            if not isinstance(table, dict):
                raise ValueError(f"{word}: {part} already has a value")
        table[name] = _Word(text)
    return from_dict(type(config), mapping, base=config)


def flatten(config: Any) -> dict[str, Any]:
    """Return a dictionary from dotted key to TOML value."""
    return dict(_flat(to_dict(config), ""))


_hints = cache(typing.get_type_hints)
_PLAIN_NAMES = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}


_TAKEN = {bool: bool, int: numbers.Integral, float: numbers.Real, str: (str, os.PathLike)}


class _Word(str):
    """A value as typed on the command line, not yet converted to the type of its field."""


def _coerce(value: Any, hint: Any, key: str) -> Any:
    if isinstance(value, _Word):
        value = _parse_word(value, hint)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None or value == "none":
            return None
        return _coerce(value, next(a for a in args if a is not type(None)), key)
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_coerce(v, args[0], key) for v in value)
    if origin is Literal:
        if value in args:
            return value
        near = "".join(f"; did you mean {n}?" for n in difflib.get_close_matches(str(value), args, 1))
        raise ValueError(f"{key} must be one of {', '.join(args)}, got {value!r}{near}")
    kinds = _TAKEN.get(hint, ())
    if isinstance(value, kinds) and (hint is bool or not isinstance(value, bool)):
        return hint(value)
    wanted = "a list" if origin is tuple else _PLAIN_NAMES[hint]
    raise ValueError(f"{key} must be {wanted}, got {value!r}")


def _parse_word(text: str, hint: Any) -> Any:
    origin = typing.get_origin(hint)
    if hint is str or origin is Literal or (origin is not tuple and str in typing.get_args(hint)):
        return str(text)
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return str(text)


def _suggestion(name: str, value: Any, cls: type, prefix: str) -> str:
    """Suggest the key that was meant, with or without its table; else list all keys of this level.

    Args:
        value: of the key `name`; a mapping holds the rest of a dotted key.
    """
    dotted = name
    while isinstance(value, Mapping) and value:
        inner, value = next(iter(value.items()))
        dotted = _join(dotted, inner)
    here = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    keys = {key: key.rpartition(".")[2] for key in (*_leaves(cls), *here)}
    same = [key for end in (dotted, name) for key in keys if f".{key}".endswith(f".{end}")]
    longer = [key for key, last in keys.items() if last.startswith(name) or name.startswith(last + "_")]
    close = difflib.get_close_matches(name, keys.values(), 1, 0.5)
    for key in (*same, *longer, *(key for key, last in keys.items() if last in close)):
        return f"did you mean {_join(prefix, key)}?"
    return f"the keys are {', '.join(here)}"


def _leaves(cls: Any, prefix: str = "") -> Iterator[str]:
    hints = _hints(cls)
    for field in dataclasses.fields(cls):
        name = _join(prefix, field.name)
        if dataclasses.is_dataclass(hints[field.name]):
            yield from _leaves(hints[field.name], name)
        else:
            yield name


def _has_default(field: dataclasses.Field) -> bool:
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _flat(table: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, _join(prefix, name))
        else:
            yield _join(prefix, name), value


def _toml_lines(table: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for name, value in table.items():
        if not isinstance(value, dict):
            yield f"{name} = {_toml_value(value)}"
    for name, value in table.items():
        if isinstance(value, dict):
            yield f"\n[{_join(prefix, name)}]"
            yield from _toml_lines(value, _join(prefix, name))


def _toml_value(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(_toml_value(v) for v in value) + "]"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007F")
    return repr(value)
