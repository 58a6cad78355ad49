"""Pictures of rows: speed beside peers, roofline, memory, cost as tokens grow, whole models.

Rows without a time (absent, wrong or failed) are not drawn. There should be one row per case and
implementation, as `report.newest` returns them.
"""

import math
import re
from pathlib import Path
from typing import Any

from benchmarks.cases import BASELINE, CEILING
from benchmarks.look import (
    GREY,
    LIMIT,
    SETTINGS,
    WIDTH,
    Picture,
    Pictures,
    Style,
    dot,
    fixed_ticks,
    grid,
    legend,
    limit_handle,
    plain_ticks,
    save,
    sheet,
    short,
    spaced,
    styles_of,
    without_axis,
    words_of,
)
from benchmarks.report import machine_words
from benchmarks.roofline import roofline
from benchmarks.rows import number, positive, split, timed

Styles = dict[str, Style]
BLOCK = "ffn"  # the ratios of this implementation are written out
MODEL = ("work", "shape", "batch", "dtype", "dropout")


def draw(rows: list[dict], folder: Path, name: str) -> list[tuple[Path, str]]:
    """Write each picture that has rows as FOLDER/NAME-KIND.png; return paths and captions of one sentence.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    import matplotlib as mpl

    blocks, models = timed(rows), [row for row in rows if "shape" in row and positive(row, "tokens_per_s")]
    styles = styles_of(row["implementation"] for row in [*blocks, *models])
    foot = "; ".join(dict.fromkeys(machine_words(row) for row in [*blocks, *models]))
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with mpl.rc_context(SETTINGS):
        pictures = [picture for kind in KINDS for picture in kind(blocks, styles)]
        for picture in [*pictures, *decoder(models, styles)]:
            path = folder / (re.sub(r"[^\w.-]+", "-", f"{name}-{picture.name}") + ".png")
            save(picture.figure, path, foot)
            written.append((path, picture.caption))
    return written


def with_dropout(p: float) -> str:
    return f", dropout {p:g}" if p else ""


# Speed beside peers


def bars(rows: list[dict], styles: Styles) -> Pictures:
    """Draw the speed over plain torch with its interval, one line per shape."""
    compared = [row for row in rows if row["implementation"] != BASELINE and positive(row, "speedup")]
    for (work, dtype, dropout), some in split(compared, "work", "dtype", "dropout").items():
        rivals = [row for row in some if row["implementation"] != CEILING]
        if not rivals:
            continue
        names = {row["implementation"] for row in some}
        what = f"{work}, {dtype}{with_dropout(dropout)}"
        hint = "Times as fast as plain torch (line at 1): further right is faster. Whiskers: 95% interval."
        handles = legend(names, styles)
        if CEILING in names:
            handles.append(limit_handle())
        cases = list(split(rivals, "block", "tokens"))
        height = 0.75 + (0.13 + 0.045 * len(names)) * len(cases)
        figure, body = sheet(f"Speed of the feed-forward block: {what}", hint, handles, height)
        panel = body.subplots()
        scale(panel, some)
        speeds(panel, some, cases, styles)
        in_figures(panel, [row for row in rivals if row["implementation"] == BLOCK], cases)
        shapes(panel, cases)
        caption = (
            f"Speed over plain torch modules by block and tokens ({what}): right of 1 is faster; whiskers "
            "are 95% intervals of the ratio of medians, black marks a yardstick, bare matmuls in the "
            "case's dtype (for few tokens also reading the weights at the speed of a copy)."
        )
        yield Picture(f"bars-{work}-{dtype}" + (f"-dropout{dropout:g}" if dropout else ""), figure, caption)


def scale(panel: Any, rows: list[dict]) -> None:
    """Set the horizontal axis to the range of all whiskers."""
    ends = [1.0, *(row[key] for row in rows for key in ("speedup", "low", "high") if positive(row, key))]
    panel.set(xscale="log", xlim=(min(ends) / 1.1, max(ends) * 1.1), xlabel="speed over plain torch")
    plain_ticks(panel.xaxis, most=12, unit="×")
    panel.grid(axis="x")
    panel.axvline(1, color=GREY, linewidth=1.6, zorder=1)


def speeds(panel: Any, rows: list[dict], cases: list[tuple[str, int]], styles: Styles) -> None:
    """Draw a dot and a whisker per row, side by side in the line of the case, and the yardstick."""
    left, right = panel.get_xlim()
    names = [name for name in styles if any(name == row["implementation"] for row in rows)]
    for row in rows:
        if (row["block"], row["tokens"]) not in cases:
            continue
        line, name = cases.index((row["block"], row["tokens"])), row["implementation"]
        if name == CEILING:
            panel.plot([row["speedup"]] * 2, (line - 0.42, line + 0.42), color=LIMIT, linewidth=1.6, zorder=2)
            continue
        style = styles[name]
        y = line + (names.index(name) + 0.5) / len(names) * 0.8 - 0.4
        # An end that is not a number may lie anywhere: draw the whisker to the edge.
        low, high = number(row, "low"), number(row, "high")
        span = (left if low is None else max(low, left), right if high is None else high)
        panel.plot(span, (y, y), color=style.colour, linewidth=1.2, alpha=0.6, zorder=2)
        panel.plot(row["speedup"], y, **dot(style), zorder=4 if style.ours else 3)


def in_figures(panel: Any, rows: list[dict], cases: list[tuple[str, int]]) -> None:
    """Write at the right of each line the ratio of the block itself, not of the best way to run it."""
    look = {"transform": panel.get_yaxis_transform(), "va": "center", "color": "#222222"}
    for row in rows:
        line = cases.index((row["block"], row["tokens"]))
        panel.text(1.01, line, f"{row['speedup']:.2f}×", weight="bold", size=8, **look)
    if rows:
        panel.text(1.01, 1.01, BLOCK, size=7, color="#222222", transform=panel.transAxes, va="bottom")


def shapes(panel: Any, cases: list[tuple[str, int]]) -> None:
    """Label the lines with block and tokens, each block once; tint every second block."""
    labels, tint = [], False
    for index, (block, tokens) in enumerate(cases):
        first = index == 0 or cases[index - 1][0] != block
        tint ^= first
        labels.append(f"{block}   {tokens:,}" if first else f"{tokens:,}")
        if tint:
            panel.axhspan(index - 0.5, index + 0.5, color="#f3f3f3", linewidth=0, zorder=0)
        if not first:
            panel.axhline(index - 0.5, color="#dddddd", linewidth=0.6, zorder=0)
    panel.set_yticks(range(len(cases)), labels)
    panel.set_ylim(len(cases) - 0.5, -0.5)
    panel.set_ylabel("block and tokens")


# Memory


def memory(rows: list[dict], styles: Styles) -> Pictures:
    """Draw bytes saved for backward per token: a figure per dtype, a panel per block, dropout paler."""
    kept_rows = [row for row in rows if positive(row, "saved_per_token") and row["implementation"] != CEILING]
    for dtype, every in split(kept_rows, "dtype").items():
        some, tokens = at_most_tokens(every)
        kept = {(row["block"], row["implementation"], row["dropout"]): row["saved_per_token"] for row in some}
        names = [name for name in styles if any(name == row["implementation"] for row in some)]
        blocks = list(split(some, "block"))
        dropouts = sorted({row["dropout"] for row in some})
        title = (
            f"Memory: what a token leaves behind for the backward pass, {dtype}{with_dropout(dropouts[0])}"
        )
        hint = f"Kilobytes saved for backward per token, of {tokens}: shorter is better."
        hint += f" Paler: with dropout {dropouts[-1]:g}." if len(dropouts) > 1 else ""
        height = (0.45 + 0.19 * len(names)) * math.ceil(len(blocks) / 3)
        figure, body = sheet(title, hint, [], height)
        for panel, block in zip(grid(body, len(blocks), 3, sharey=True), blocks, strict=True):
            values = [[kept.get((block, name, p)) for p in (dropouts[0], dropouts[-1])] for name in names]
            saved(panel, values, [styles[name] for name in names])
            panel.set_yticks(range(len(names)), names)
            panel.set_ylim(len(names) - 0.4, -0.6)
            panel.set_title(block)
        copies = ", with the weights' bfloat16 copies" if dtype == "autocast" else ""
        caption = (
            f"Bytes saved for backward per token, by block and implementation, in {dtype}{copies}, "
            f"of {tokens}."
        )
        yield Picture(f"memory-{dtype}", figure, caption)


def at_most_tokens(rows: list[dict]) -> tuple[list[dict], str]:
    """Return the rows with the most tokens that all blocks share, else each block's most; and the count."""
    counts = {block: {row["tokens"] for row in part} for block, part in split(rows, "block").items()}
    shared = set.intersection(*counts.values())
    most = {block: max(shared or own) for block, own in counts.items()}
    words = f"{max(shared):,} token{'s' * (shared != {1})}" if shared else "as many tokens as were measured"
    return [row for row in rows if row["tokens"] == most[row["block"]]], words


def saved(panel: Any, values: list[list[float | None]], styles: list[Style]) -> None:
    """Draw a bar per implementation: without dropout, and behind it with dropout."""
    most = max((value for pair in values for value in pair if value), default=1)
    for y, ((plain, dropped), style) in enumerate(zip(values, styles, strict=True)):
        panel.barh(y, (dropped or 0) / 1e3, color=style.colour, alpha=0.35, height=0.68)
        panel.barh(y, (plain or 0) / 1e3, color=style.colour, height=0.68)
        told = dict.fromkeys(short(value / 1e3) for value in (plain, dropped) if value)
        end = max(plain or 0, dropped or 0) / 1e3 + most / 4e4
        panel.text(end, y, " to ".join(told) + " KB" if told else "", **words_of(style))
    panel.set_xlim(0, most / 1e3 * 1.5)
    without_axis(panel)


# Cost as tokens grow


def cost(rows: list[dict], styles: Styles) -> Pictures:
    """Draw a panel per block timed at three or more numbers of tokens, without dropout if possible."""
    for key, what, unit in (("ms", "time", "ms"), ("peak_MB", "peak memory", "MB")):
        there = [row for row in rows if positive(row, key) and row["implementation"] != CEILING]
        for (work, dtype), some in split(there, "work", "dtype").items():
            for dropout, part in sorted(split(some, "dropout").items()):
                blocks = {
                    block: of for block, of in split(part, "block").items() if len(split(of, "tokens")) > 2
                }
                if blocks:
                    how = f"{work}, {dtype}{with_dropout(dropout)}"
                    figure = curves(blocks, styles, key, what, unit, how)
                    caption = f"{what.capitalize()} of one call by number of tokens ({how}): lower is better."
                    yield Picture(f"cost-{what.split()[-1]}-{work}-{dtype}", figure, caption)
                    break


def curves(blocks: dict[str, list[dict]], styles: Styles, key: str, what: str, unit: str, how: str) -> Any:
    """Return the figure: a panel per block, a line per implementation."""
    hint = f"{what.capitalize()} of one call by number of tokens, both axes logarithmic: lower is better."
    names = {row["implementation"] for part in blocks.values() for row in part}
    handles = legend(names, styles, linestyle="-")
    figure, body = sheet(
        f"Cost as tokens grow: {what}, {how}", hint, handles, 2.3 * math.ceil(len(blocks) / 3) + 0.2
    )
    for panel, (block, part) in zip(grid(body, len(blocks), 3), blocks.items(), strict=True):
        panel.set(xscale="log", yscale="log", title=block)
        for name, points in split(part, "implementation").items():
            ours = styles[name].ours
            look = dot(styles[name]) | {"linestyle": "-", "linewidth": 2 if ours else 1.2, "markersize": 4.5}
            curve = sorted((row["tokens"], row[key]) for row in points)
            panel.plot(*zip(*curve, strict=True), **look, zorder=3 if ours else 2)
        plain_ticks(panel.yaxis, most=6)
        fixed_ticks(panel.xaxis, spaced(sorted(split(part, "tokens")), WIDTH / min(len(blocks), 3) - 0.6))
        panel.grid()
    body.supxlabel("tokens", size=9)
    body.supylabel(f"{what}, {unit}", size=9)
    return figure


# Whole models


def decoder(rows: list[dict], styles: Styles) -> Pictures:
    """Draw tokens per second of training steps and generation, one panel per case."""
    panels = split([{"batch": "?", "dropout": 0.0} | row for row in rows], *MODEL)
    if not panels:
        return
    counts = [len(part) for part in panels.values()]
    tall = [max(counts[at : at + 2]) for at in range(0, len(counts), 2)]  # bars in each row of panels
    hint = "Tokens per second: longer is faster. In brackets: the ratio to plain torch."
    height = sum(0.6 + 0.21 * bars for bars in tall)
    figure, body = sheet("Whole models: tokens per second", hint, [], height)
    places = grid(body, len(panels), 2, height_ratios=tall)
    for at, ((work, shape, batch, dtype, dropout), part) in enumerate(panels.items()):
        panel = places[at]
        longest = max(row["tokens_per_s"] for row in part)
        for y, row in enumerate(part):
            style, speed = styles[row["implementation"]], row["tokens_per_s"]
            panel.barh(y, speed, color=style.colour, height=0.68)
            ratio = f"  ({row['speedup']:.2f}×)" if positive(row, "speedup") else ""
            panel.text(speed + longest / 50, y, short(speed) + ratio, **words_of(style))
        panel.set_title(f"{shape}: {work}\nbatch {batch}, {dtype}{with_dropout(dropout or 0)}")
        panel.set_yticks(range(len(part)), [row["implementation"] for row in part])
        panel.set(xlim=(0, longest * 1.5), ylim=(tall[at // 2] - 0.4, -0.6))
        without_axis(panel)
    caption = "Tokens per second of whole models, training steps and generation, by implementation."
    yield Picture("decoder", figure, caption)


KINDS = (bars, roofline, memory, cost)
