"""Write the measured tables of README.md and docs/measured.md from the newest rows in ``results/``.

python -m benchmarks readme     replaces each table, found by its first line, and docs/ffn-*.png
"""

from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks import plots, report
from benchmarks.cases import BLOCKS, WARM
from benchmarks.report import RESULTS, arguments, lines_of, read
from benchmarks.suites import SMALL
from benchmarks.twins import SHAPES
from ffn.files import atomic

README = RESULTS.parents[1] / "README.md"
MEASURED = README.parent / "docs" / "measured.md"
PICTURES = ("bars-training-float32", "bars-training-bfloat16", "memory-float32", "roofline-float32")
PICTURES += ("cost-time-training-float32",)
DROPOUTS = (0.0, 0.1)
KINDS = {"gelu": "GELU", "gelu_tanh": "tanh-GELU", "swiglu": "SwiGLU", "geglu_tanh": "GeGLU"}


def timed(name: str) -> list[dict]:
    """Return the newest timed rows of results/NAME.jsonl; all rows of a block's case are from one run."""
    rows = report.newest([row for row in read(RESULTS / f"{name}.jsonl") if "ms" in row or "seconds" in row])
    return report.last_runs(rows) if name == "ffn" else rows


def newest(name: str, keys: tuple[str, ...], **wanted: object) -> dict[tuple, dict]:
    """Return the rows of `timed` with the wanted values, keyed by `keys`."""
    rows = [row for row in timed(name) if all(row.get(k) == v for k, v in wanted.items())]
    return {tuple(row[key] for key in keys): row for row in rows}


def label(name: str) -> str:
    """Return the label of a block, such as GELU 256/1024."""
    block = BLOCKS[name]
    return f"{KINDS[block.activation]} {block.dim}/{block.hidden_dim}"


def ratios(rows: Iterable[dict | None]) -> list[str]:
    """Format speedups; a dash for a missing one."""
    return [f"{row['speedup']:.2f}" if row and "speedup" in row else "-" for row in rows]


def of_the_block() -> list[str]:
    dtypes = {"float32": "float32", "autocast": "bf16 autocast", "bfloat16": "bfloat16"}
    header = ["shape, tokens"] + [word for dtype in dtypes.values() for word in (dtype, "dropout 0.1")]
    keys = ("block", "tokens", "dtype", "dropout")
    rows = newest("ffn", keys, implementation="ffn", work="training")
    table = []
    for name in ("small", "bert-base", "qwen2.5-0.5b"):
        for tokens in (512, 2048):
            found = [rows.get((name, tokens, dtype, p)) for dtype in dtypes for p in DROPOUTS]
            table.append([f"{label(name)}, {tokens}", *ratios(found)])
    return lines_of(header, table)


def of_peers() -> list[str]:
    names = ("ffn", "torch.compile", "TransformerEncoderLayer", "hf", "x-transformers", "timm")
    words = {"torch.compile": "compiled", "TransformerEncoderLayer": "torch's layer", "hf": "transformers"}
    header = ["a block of"] + [words.get(name, name) for name in names] + ["ffn, bf16", "saved", "peak"]
    keys = ("block", "dtype", "implementation")
    rows = newest("ffn", keys, work="training", tokens=512, dropout=0.0)
    table = []
    for name, block in BLOCKS.items():
        if (name, "float32", "ffn") not in rows:
            continue
        hf = "hf LlamaMLP" if block.gated else "hf GPT2MLP"
        found = [rows.get((name, "float32", hf if each == "hf" else each)) for each in names]
        ours, plain = (rows[name, "float32", each] for each in ("ffn", "torch"))
        memory = [f"{ours[key] / plain[key]:.2f}" for key in ("saved_per_token", "peak_MB")]
        half = rows.get((name, "bfloat16", "ffn"))
        table.append([f"{name}, {label(name)}", *ratios([*found, half]), *memory])
    return lines_of(header, table)


def of_inference() -> list[str]:
    counts = (1, 16, 512, 2048)
    header = ["packed, tokens"] + [f"{n}" for n in counts] + [f"bf16, {n}" for n in counts]
    header += [f"int8, {n}" for n in counts[:2]]
    rows = newest("ffn", ("block", "tokens", "dtype", "implementation"), work="inference")
    table = []
    for name in BLOCKS:
        cases = [(dtype, n, "ffn packed") for dtype in ("float32", "bfloat16") for n in counts]
        cases += [("float32", n, "ffn int8") for n in counts[:2]]
        found = [rows.get((name, n, dtype, each)) for dtype, n, each in cases]
        if any(found):
            table.append([f"{name}, {label(name)}", *ratios(found)])
    return lines_of(header, table)


def of_warm_inference() -> list[str]:
    forms = {"float32": ("ffn packed", "ffn int8"), "bfloat16": ("ffn packed",)}
    cases = [(n, dtype, name) for dtype, names in forms.items() for name in names for n in (1, 16)]
    header = ["in the cache, tokens", *["1", "16", "int8, 1", "int8, 16", "bf16, 1", "bf16, 16"]]
    rows = newest("ffn", ("block", "tokens", "dtype", "implementation"), work=WARM)
    table = [[f"{name}, {label(name)}", *ratios(rows.get((name, *case)) for case in cases)] for name in SMALL]
    return lines_of(header, table)


def of_reviews() -> list[str]:
    title = (
        "rt-polarity, 80/10/10 by class (`python -m benchmarks classification DIR --task reviews --epochs 3`)"
    )
    rows = [row for row in read(RESULTS / "classification.jsonl") if row["task"] == "reviews"]
    found = {(row["implementation"], row["what"]): row for row in rows}
    cached = f"MiniLM, the head alone, cached features ({found['ffn', 'head']['cache_s']:.0f} s to make)"
    names = {("ffn", "head"): cached, ("ffn", "head uncached"): "MiniLM, the head alone, without the cache"}
    names |= {("transformers", "head"): "the same by transformers", ("ffn", "all"): "MiniLM, everything"}
    names |= {
        ("transformers", "all"): "the same by transformers",
        ("ffn", "scratch"): "from scratch, 3 epochs",
    }
    names |= {("scikit-learn", "TF-IDF of words"): "TF-IDF and logistic regression"}
    table = []
    for key, name in names.items():
        seconds = [found[key].get("train_s"), found[key].get("epoch_s")]
        words = ["-" if s is None else f"{s:.0f}" if s >= 10 else f"{s:.1f}" for s in seconds]
        table.append([name, f"{found[key]['accuracy']:.1%}", *words])
    return lines_of([title, "accuracy", "training, s", "an epoch, s"], table)


def of_the_training_step() -> list[str]:
    wanted = {"implementation": "ffn", "dtype": "float32", "work": "training step"}
    rows = newest("decoder", ("shape", "dropout"), **wanted)
    table = []
    for name, shape in SHAPES.items():
        model = f"{shape.num_layers} layers of {shape.dim}, {shape.batch} x {shape.max_seq_len} tokens"
        for p in DROPOUTS:
            if row := rows.get((name, p)):
                shares = [f"{row[key]:.2f}" for key in ("saved_ratio", "mfu")]
                table.append([model, str(p), *ratios([row]), *shares])
    return lines_of(["model", "dropout", "speed", "activations saved", "of the products' rate"], table)


def of_shakespeare() -> list[str]:
    table = []
    for (name,), row in newest("shakespeare", ("implementation",)).items():
        counts = [f"{row[key]:,}" for key in ("steps", "parameters")]
        table.append([name, *counts, f"{row['seconds']:.0f}", f"{row['val_loss']:.3f}"])
    return lines_of(["trained by", "steps", "parameters", "seconds", "loss"], table)


def of_generation() -> list[str]:
    rows = newest(
        "decoder", ("implementation", "dtype", "batch"), work="generation", shape="gpt2", new_tokens=128
    )
    header, table = ["tokens a second"], []
    cases = [(dtype, batch) for dtype in ("float32", "bfloat16") for batch in (1, 8)]
    header += [f"{dtype}, batch {batch}" for dtype, batch in cases]
    for name in dict.fromkeys(name for name, *_ in rows):
        found = [rows.get((name, *case), {}).get("tokens_per_s") for case in cases]
        table.append([name, *("-" if rate is None else f"{rate:.1f}" for rate in found)])
    return lines_of(header, table)


PAGES = {
    README: (of_reviews, of_the_block, of_shakespeare, of_generation),
    MEASURED: (of_peers, of_inference, of_warm_inference, of_the_training_step),
}


def rewritten(page: Path, text: str) -> str:
    """Return the text of a page with every table replaced from the rows.

    Raises:
        ValueError: if a table is missing or there twice.
    """
    lines = text.splitlines()
    for table in (make() for make in PAGES[page]):
        if lines.count(table[0]) != 1:
            raise ValueError(f"{page.name} must have one table that begins with {table[0]}")
        start = end = lines.index(table[0])
        while end < len(lines) and lines[end].startswith("|"):
            end += 1
        lines[start:end] = table
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> None:
    arguments("readme", __doc__, keeps_rows=False).parse_args(argv)
    for page in PAGES:
        atomic.write_file(page, rewritten(page, page.read_text("utf-8")))
    with TemporaryDirectory() as folder:
        plots.draw(timed("ffn"), Path(folder), "ffn")
        for name in PICTURES:
            picture = f"ffn-{name}.png"
            atomic.write_file(README.parent / "docs" / picture, (Path(folder) / picture).read_bytes())
