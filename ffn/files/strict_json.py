"""Untrusted input: JSON read strictly, and values of it quoted safely in one-line messages."""

import json
import math
from pathlib import Path
from typing import Any

MAX_JSON_BYTES = 100_000_000  # safetensors' own limit for a header


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; ValueError unless UTF-8, with unique keys and finite numbers."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"{path}: more than {MAX_JSON_BYTES:,} bytes of JSON")
        return parse_json(path.read_bytes(), path)
    except OSError as error:
        raise ValueError(f"{path}: cannot read this file: {error.strerror}") from None


def parse_json(text: bytes, path: Path) -> dict[str, Any]:
    """Return the JSON object in a text, checked as in `read_json`; `path` is for the message."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise ValueError(f"the key {short(key)} occurs twice")
            found[key] = value
        return found

    def finite(number: str) -> float:
        if not math.isfinite(value := float(number)):
            raise ValueError(f"{short(number)} is not a finite number")
        return value

    try:
        hooks = {"object_pairs_hook": unique, "parse_float": finite, "parse_constant": finite}
        content = json.loads(text.decode(), **hooks)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON, or damaged ({one_line(error)})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must hold a JSON object, got {short(content)}")
    return content


def one_line(error: object) -> str:
    """Return the message of a library's error as part of one line, shortened: it may quote a file."""
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else f"{text[:200]}..."


def short(value: object) -> str:
    """Return a value from a file as ASCII, shortened if it is long."""
    text = ascii(value)
    return text if len(text) <= 100 else f"{text[:100]}..."
