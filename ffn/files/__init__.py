"""Files that are whole or absent: atomic writes, safetensors shards, strict JSON, dataclasses as TOML."""
