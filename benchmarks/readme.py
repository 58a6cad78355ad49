"""The README's measured tables, written from the rows in ``results/``: the newest of each case.

python -m benchmarks readme             writes the tables anew; each is found by its first line
"""

import json

from benchmarks import block, training_step
from benchmarks.report import RESULTS, arguments, lines_of
from ffn import activations, atomic

README = RESULTS.parents[1] / "README.md"
DROPOUTS = (0.0, 0.1)


def newest(name: str, keys: tuple[str, ...], **wanted: object) -> dict[tuple, dict]:
    """The last row of each case in results/NAME.jsonl that has the wanted values; cases go by `keys`."""
    found = {}
    for line in (RESULTS / f"{name}.jsonl").read_text().splitlines():
        row = json.loads(line)
        if all(row[key] == value for key, value in wanted.items()):
            found[tuple(row[key] for key in keys)] = row
    return found


def of_the_block() -> list[str]:
    modes = {"float32": "float32", "autocast": "bf16 autocast", "bfloat16": "bfloat16"}
    header = ["shape, tokens"] + [word for mode in modes.values() for word in (mode, "dropout 0.1")]
    keys = ("case", "tokens", "mode", "dropout")
    rows = newest("block", keys, implementation="ffn", work="training")
    table = []
    for case, shape in block.SHAPES.items():
        kind = "SwiGLU" if activations.TABLE[shape.activation].gated else "GELU"
        for tokens in (512, 2048):
            ratios = [rows[case, tokens, mode, p]["speedup"] for mode in modes for p in DROPOUTS]
            table.append([f"{kind} {case}, {tokens}", *(f"{ratio:.2f}" for ratio in ratios)])
    return lines_of(header, table)


def of_the_training_step() -> list[str]:
    rows = newest("training_step", ("shape", "dropout"), implementation="ffn", mode="float32")
    table = []
    for name, shape in training_step.SHAPES.items():
        model = f"{shape.num_layers} layers of {shape.dim}, {shape.batch} x {shape.max_seq_len} tokens"
        for p in DROPOUTS:
            row = rows[name, p]
            table.append([model, str(p), f"{row['speedup']:.2f}", f"{row['saved_ratio']:.2f}"])
    return lines_of(["model", "dropout", "speed", "activations saved"], table)


def of_shakespeare() -> list[str]:
    table = []
    for (name,), row in newest("shakespeare", ("implementation",)).items():
        counts = [f"{row[key]:,}" for key in ("steps", "parameters")]
        table.append([name, *counts, f"{row['seconds']:.0f}", f"{row['val_loss']:.3f}"])
    return lines_of(["trained by", "steps", "parameters", "seconds", "loss"], table)


def of_generation() -> list[str]:
    rows = newest("generation", ("implementation", "dtype"))
    names = dict.fromkeys(name for name, _ in rows)
    dtypes = ("float32", "bfloat16")
    table = [[name, *(f"{rows[name, dtype]['tokens_per_s']:.1f}" for dtype in dtypes)] for name in names]
    return lines_of(["tokens a second", *dtypes], table)


TABLES = (of_the_block, of_the_training_step, of_shakespeare, of_generation)


def rewritten(text: str) -> str:
    """The README with every table as the rows have it.

    Raises:
        ValueError: a table is not there, or twice.
    """
    lines = text.splitlines()
    for table in (make() for make in TABLES):
        if lines.count(table[0]) != 1:
            raise ValueError(f"README.md wants one table that begins with {table[0]}")
        start = end = lines.index(table[0])
        while end < len(lines) and lines[end].startswith("|"):
            end += 1
        lines[start:end] = table
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> None:
    arguments("readme", __doc__, keeps_rows=False).parse_args(argv)
    atomic.write_file(README, rewritten(README.read_text("utf-8")))
