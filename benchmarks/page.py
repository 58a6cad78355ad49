"""report.html: one self-contained file with the machine, a legend, the pictures and all rows."""

import base64
from collections.abc import Iterable, Iterator
from html import escape
from pathlib import Path

from benchmarks import plots
from benchmarks.look import is_ours
from benchmarks.report import CASE, cell, newest, read, values
from ffn.files import atomic

STAMP = ("gpu", "capability", "gpu_bytes", "cpu", "threads", "torch", "cuda", "triton", "commit", "time")
FIRST = (
    "tokens_per_s",
    "ms",
    "iqr",
    "rounds",
    "speedup",
    "low",
    "high",
    "tflops",
    "gbs",
    "mfu",
    "of_ceiling",
)
FIRST += ("saved_per_token", "peak_MB", "ttft_ms", "error", "setup_s")
MEANINGS = {
    "speedup": "times as fast as plain torch in the same rounds (the ratio of medians); above 1 is faster. "
    "Its interval holds within one process; another process may move it by a few percent",
    "low, high": "the 95% bootstrap interval of speedup; if it contains 1, neither is shown to be faster",
    "ms, iqr, rounds": "the median time of one call, its interquartile range, and the number of timings",
    "tflops": "10¹² floating-point operations per second, counting the matmuls only",
    "of_ceiling": "the time of the ceiling over this time: a yardstick, not a proven limit; a cache or a "
    "better matmul can bring it above 1",
    "ceiling": "the least time of the bare matmuls (gate and up joined or separate) in the same run; "
    "for few tokens, the time to read the weights at the speed of a copy if that is longer",
    "gbs": "10⁹ bytes per second of a copy, reads and writes",
    "saved_per_token": "bytes saved for backward per token",
    "peak_MB": "the peak memory of a call beyond the memory held before, 10⁶ bytes",
    "host_ms": "the time of one call when many are queued in a row: the host's time",
    "error": "relative error against the same block in float64 (Frobenius norm); wrong results are not timed",
    "setup_s": "seconds before the first timed call: building and compiling",
    "tokens_per_s": "tokens per second of a whole model",
    "over_transformers": "times as fast as transformers' own model in the same rounds",
    "ceiling_tflops": "tflops of the bare matmuls of the same model, measured in the same rounds",
    "mfu": "model FLOP utilisation: tflops over ceiling_tflops",
    "saved_MB": "memory saved for backward, 10⁶ bytes",
    "saved_ratio": "saved_MB over that of plain torch; below 1 is less",
    "ttft_ms": "time to the first generated token",
    "note": "the version or backend, or the reason for a missing time",
}
STYLE = """
:root { color-scheme: light dark; --ink: #1d2430; --soft: #5b6472; --line: #d9dde3; --ground: #fff;
  --tint: #f4f6f9; --ours: #e3f0fa; --link: #0060a0 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e7ec; --soft: #a0a8b5; --line: #363c47; --ground: #14171c;
    --tint: #1d2128; --ours: #14314a; --link: #7cc0f0 }
}
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 75rem; font: 16px/1.5 system-ui, sans-serif;
  color: var(--ink); background: var(--ground) }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .5rem }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .75rem }
a { color: var(--link) }
nav { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem }
.soft, figcaption { color: var(--soft) }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; margin: 0 0 1rem }
dt { font-weight: 600 }
dd { margin: 0; overflow-wrap: anywhere }
figure { margin: 0 0 2.5rem; max-width: 800px }
img { display: block; width: 100%; height: auto; background: #fff; border: 1px solid var(--line);
  border-radius: 6px }
figcaption { margin-top: .5rem; font-size: .925rem }
.wide { overflow: auto; max-height: 90vh; border: 1px solid var(--line); border-radius: 6px }
table { border-collapse: collapse; font-size: .825rem; line-height: 1.35; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .6rem; text-align: left; white-space: nowrap; border-bottom: 1px solid var(--line) }
th { position: sticky; top: 0; background: var(--tint) }
.number { text-align: right }
td.note { white-space: normal; min-width: 16rem }
tr.ours { background: var(--ours) }
tr.unmeasured { color: var(--soft) }
tr.begins td { border-top: 2px solid var(--soft) }
@media (max-width: 40rem) { dl { grid-template-columns: 1fr } dd { margin-bottom: .5rem } }
"""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  # the browser blocks everything else
HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<h1>{title}</h1>
"""


def write(rows: list[dict], pictures: list[tuple[Path, str]], path: Path, title: str) -> None:
    """Write the page to `path`; embed the pictures, PNG files with captions."""
    sections = {
        "machine": ("Machine and versions", machines(rows)),
        "reading": ("How to read it", reading(rows)),
        "pictures": ("Pictures", [figure(*picture) for picture in pictures]),
        "blocks": ("Rows: feed-forward blocks", table([row for row in rows if "shape" not in row])),
        "models": ("Rows: whole models", table([row for row in rows if "shape" in row])),
    }
    bodies = {name: (heading, [*body]) for name, (heading, body) in sections.items()}
    there = [name for name, (_, body) in bodies.items() if body]
    parts = [HEAD.format(title=escape(title), style=STYLE, policy=POLICY), *summary(rows, there)]
    for name in there:
        heading, body = bodies[name]
        parts += [f'<h2 id="{name}">{heading}</h2>', *body]
    atomic.write_file(path, "\n".join([*parts, "</body>", "</html>", ""]))


def summary(rows: list[dict], sections: list[str]) -> Iterator[str]:
    done = sum(map(measured, rows))
    words = f"{done} rows with a time"
    if done < len(rows):
        words += f", {len(rows) - done} without, with the reason as their note"
    yield f'<p class="soft">{words}. Quote ratios, not times: times depend on the machine and the hour.</p>'
    yield "<nav>" + "".join(f'<a href="#{name}">{name.capitalize()}</a>' for name in sections) + "</nav>"


def measured(row: dict) -> bool:
    return row.get("ms") is not None or row.get("tokens_per_s") is not None


def machines(rows: list[dict]) -> Iterator[str]:
    """Yield each machine and commit of the rows, and the versions in the notes of timed rows."""
    found: dict[tuple, list[dict]] = {}
    for row in rows:
        stamp = tuple((key, cell(row.get(key))) for key in STAMP[:-1] if row.get(key) not in (None, ""))
        found.setdefault(stamp, []).append(row)
    for stamp, some in found.items():
        times = sorted(str(row["time"]) for row in some if "time" in row)
        facts = [*stamp]
        facts += [("time", " to ".join(dict.fromkeys((times[0], times[-1]))))] if times else []
        notes = sorted({str(row["note"]) for row in some if measured(row) and row.get("note")})
        facts += [("versions, backends", "; ".join(notes))] if notes else []
        yield definitions(facts)


def reading(rows: list[dict]) -> Iterator[str]:
    """Yield the meaning of each column in the rows."""
    there = {key for row in rows for key in row} | {row.get("implementation") for row in rows}
    yield definitions((word, text) for word, text in MEANINGS.items() if there.issuperset(word.split(", ")))


def definitions(pairs: Iterable[tuple[str, str]]) -> str:
    items = (f"<dt>{escape(word)}</dt><dd>{escape(text)}</dd>" for word, text in pairs)
    return f"<dl>{''.join(items)}</dl>"


def figure(path: Path, caption: str) -> str:
    content, words = base64.b64encode(path.read_bytes()).decode(), escape(caption)
    image = f'<img alt="{words}" src="data:image/png;base64,{content}">'
    return f'<figure id="{escape(path.stem)}">{image}<figcaption>{words}</figcaption></figure>'


def table(rows: list[dict]) -> Iterator[str]:
    """Yield the rows without the machine's columns, and a rule between cases; nothing without rows."""
    if not rows:
        return
    keys = dict.fromkeys(key for row in rows for key in row if key not in STAMP and key != "note")
    known = [key for key in (*CASE, *FIRST) if key in keys]
    columns = [*known, *(key for key in keys if key not in known), "note"]
    numbers = {key for key in columns if all(isinstance(row.get(key), int | float | None) for row in rows)}
    looks = {key: ' class="number"' if key in numbers else "" for key in columns} | {"note": ' class="note"'}
    yield '<div class="wide" tabindex="0"><table><thead><tr>'
    yield "".join(f"<th{looks[key]}>{escape(key)}</th>" for key in columns) + "</tr></thead><tbody>"
    start = len([key for key in columns if key in CASE])
    before = None
    for row in rows:
        case = values(row, CASE[:-1])
        kinds = ["begins"] * (before not in (None, case)) + ["ours"] * is_ours(str(row.get("implementation")))
        cells = [f"<td{looks[key]}>{escape(cell(row.get(key)))}</td>" for key in columns]
        if not measured(row):  # the note takes the place of the numbers
            said = [f"{key} {cell(row[key])}" for key in columns[start:-1] if row.get(key) is not None]
            said = "; ".join([*said, cell(row.get("note"))])
            cells[start:] = [f'<td colspan="{len(columns) - start}">{escape(said)}</td>']
            kinds += ["unmeasured"]
        yield f'<tr class="{" ".join(kinds)}">{"".join(cells)}</tr>'
        before = case
    yield "</tbody></table></div>"


def present(suite: str, folder: Path) -> None:
    """Write pictures and report.html from the newest rows of FOLDER/SUITE.jsonl."""
    rows = newest(read(folder / f"{suite}.jsonl"))
    try:
        pictures = plots.draw(rows, folder, suite)
    except ImportError as error:
        print(f"no pictures: {error}")
        pictures = []
    write(rows, pictures, folder / "report.html", f"ffn: the suite {suite}")
    print(f"wrote {folder / 'report.html'}")
