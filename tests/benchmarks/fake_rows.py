"""Rows as a benchmark of a small machine would leave them, without running it."""

import random

from benchmarks.cases import BLOCKS, Case

STAMP = {
    "torch": "2.13.0",
    "threads": 2,
    "cpu": "AMD EPYC",
    "commit": "4ea716a0b7",
    "time": "2026-01-01T00:00:00Z",
}
SPEED = {"torch": 1.0, "ffn": 1.45, "ffn save=input": 1.2, "torch.compile": 1.12, "torch max-autotune": 1.18}
SPEED |= {"TransformerEncoderLayer": 1.02, "hf GPT2MLP": 0.98, "timm": 0.96, "x-transformers": 0.9}
KEPT = {"torch": 13, "ffn": 5, "ffn save=input": 1, "torch.compile": 9, "torch max-autotune": 9}
KEPT |= {"TransformerEncoderLayer": 13, "hf GPT2MLP": 14, "timm": 13, "x-transformers": 14}
GFLOPS, GBS = {"float32": 140.0, "bfloat16": 420.0, "autocast": 380.0}, 14.0


def of(case: Case, chance: random.Random) -> list[dict]:
    """What one case leaves: the ceiling, each implementation, and one that is absent."""
    moved = (case.block.weights + 2 * case.tokens * case.block.dim) * case.element.itemsize
    moved *= 3 if case.work == "training" else 1
    limit = max(case.flops / GFLOPS[case.dtype] / 1e6, moved / GBS / 1e6)
    about = case.columns()
    plain = limit * chance.uniform(1.9, 2.4)
    ceiling = {
        "ms": limit,
        "speedup": plain / limit,
        "tflops": case.flops / limit / 1e9,
        "gbs": GBS * chance.uniform(0.8, 1),
    }
    rows = [{**about, "implementation": "ceiling", **ceiling, **STAMP}]
    for name, speed in SPEED.items():
        ratio = 1.0 if name == "torch" else speed * chance.uniform(0.85, 1.25)
        ratio *= 1.1 if "ffn" in name and case.tokens < 64 else 1
        noise = 0 if name == "torch" else chance.uniform(0.02, 0.12)
        row = about | {"implementation": name, "ms": plain / ratio, "iqr": plain * 0.03, "rounds": 11}
        row |= {"speedup": ratio, "low": ratio * (1 - noise), "high": ratio * (1 + noise)}
        row |= {"tflops": case.flops * ratio / plain / 1e9, "of_ceiling": limit * ratio / plain}
        row |= {
            "peak_MB": 20 + KEPT[name] * case.tokens * case.block.dim * 4 / 1e6,
            "error": 4e-7,
            "setup_s": 0.2,
        }
        if case.work == "training":
            masks = 4 * case.dropout * 10 * (0 if "ffn" in name else 1)
            row["saved_per_token"] = (KEPT[name] + masks) * case.block.dim * case.element.itemsize
        rows.append(row | {"note": ""} | STAMP)
    return [*rows, {**about, "implementation": "liger", "note": "wants a GPU", **STAMP}]


def rows_of(blocks: tuple[str, ...] = tuple(BLOCKS), tokens: tuple[int, ...] = (16, 512, 2048)) -> list[dict]:
    """Float32 training with dropout and without, and inference."""
    chance = random.Random(0)
    cases = [
        Case(BLOCKS[block], count, "float32", work, dropout)
        for work, dropout in (("training", 0.0), ("training", 0.1), ("inference", 0.0))
        for block in blocks
        for count in tokens
    ]
    return [row for case in cases for row in of(case, chance)]


def decoder_rows() -> list[dict]:
    rows = []
    speeds = {"torch": 1.0, "transformers": 1.1, "ffn": 1.5, "ffn packed": 1.9, "ffn int8": 4.6}
    for work, batch, base in (("training step", 4, 812.0), ("generation", 1, 21.0), ("generation", 8, 96.0)):
        for name, ratio in list(speeds.items())[: 3 if work == "training step" else 5]:
            row = {
                "shape": "gpt2",
                "implementation": name,
                "dtype": "float32",
                "work": work,
            }
            row |= {"batch": batch, "tokens_per_s": base * ratio, "speedup": ratio, "low": ratio * 0.95}
            rows.append(row | {"high": ratio * 1.05, "peak_MB": 900.0, "mfu": 0.5, **STAMP})
    return rows
