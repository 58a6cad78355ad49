"""The roofline: every case against the bare matmuls and the copy measured in the same run."""

import math
from typing import Any

from benchmarks.cases import BLOCKS, CEILING, EIGHT_BITS, WARM, Case
from benchmarks.look import LIMIT, Picture, Pictures, Style, dot, legend, plain_ticks, sheet, short
from benchmarks.rows import positive, split


def roofline(rows: list[dict], styles: dict[str, Style]) -> Pictures:
    """Return a figure per dtype; the bandwidth is the greatest of all rows."""
    ceilings = [row for row in rows if row["implementation"] == CEILING]
    bandwidth = max((row["gbs"] for row in ceilings if positive(row, "gbs")), default=None)
    known = [row for row in rows if row["block"] in BLOCKS and positive(row, "tflops")]
    inside = [
        row for row in known if row["work"] != WARM
    ]  # their weights come from the cache, so the memory roof does not apply
    for dtype, some in split(inside, "dtype").items():
        # the roofs are those of matmuls in the case's dtype
        points = [row for row in some if row["implementation"] not in {CEILING, *EIGHT_BITS}]
        if not points:
            continue
        peak = max((row["tflops"] for row in some if row["implementation"] == CEILING), default=None)
        title = f"Roofline: the block beneath bare products and a copy, {dtype}"
        hint = "Higher is faster. Lines: yardsticks of the same run. Filled: training; hollow: inference."
        figure, body = sheet(title, hint, legend({row["implementation"] for row in points}, styles), 4.6)
        unit, scale = ("TFLOP/s", 1.0) if max(row["tflops"] for row in points) > 3 else ("GFLOP/s", 1e3)
        panel = body.subplots()
        panel.set(xscale="log", yscale="log", ylabel=f"speed, {unit}")
        panel.set_xlabel("arithmetic intensity, FLOP a byte of weights, input and output")
        cases = [Case(BLOCKS[row["block"]], row["tokens"], dtype, row["work"]) for row in points]
        for case, row in zip(cases, points, strict=True):
            style = styles[row["implementation"]]
            look = dot(style) | {"zorder": 4 if style.ours else 3}
            if not case.trains:
                look |= {"markerfacecolor": "white", "markeredgecolor": style.colour, "markeredgewidth": 1}
            panel.plot(intensity(case), row["tflops"] * scale, **look)
        panel.set_xlim(around([intensity(case) for case in cases], 30))
        heights = [row["tflops"] * scale for row in points] + ([peak * scale] if peak else [])
        panel.set_ylim(around(heights, 10))
        roofs(panel, peak and peak * scale, bandwidth and bandwidth * scale / 1e3, unit)
        ground(panel, cases)
        plain_ticks(panel.xaxis)
        plain_ticks(panel.yaxis)
        panel.grid()
        caption = (
            f"The speed of every case in {dtype} over its arithmetic intensity, beneath the greatest speed "
            "of bare matrix products in that dtype and of a copy measured in the same run; what multiplies "
            "in 8 bits is left out."
        )
        yield Picture(f"roofline-{dtype}", figure, caption)


def intensity(case: Case) -> float:
    """Return FLOP per byte: weights, input and output are moved once per pass; training is three passes."""
    passes = 3 if case.work == "training" else 1
    elements = case.block.weights + 2 * case.tokens * case.block.dim
    return case.flops / (passes * elements * case.element.itemsize)


def around(values: list[float], least: float) -> tuple[float, float]:
    """Return the ends of a logarithmic axis for the values, at least a factor `least` apart."""
    room = max(1.5, math.sqrt(least * min(values) / max(values)))
    return min(values) / room, max(values) * room


def roofs(panel: Any, peak: float | None, slope: float | None, unit: str) -> None:
    """Draw the speed of bare matmuls and the copy's line in FLOP/s over FLOP per byte, where measured."""
    from matplotlib.patheffects import withStroke

    left, right = panel.get_xlim()
    ridge = min(max(peak / slope, left), right) if peak and slope else (right if slope else left)
    look = {"color": LIMIT, "linewidth": 1.6, "zorder": 2}
    words = {"zorder": 5, "size": 8, "path_effects": [withStroke(linewidth=3, foreground="white")]}
    if slope and ridge > left:
        panel.plot((left, ridge), (left * slope, ridge * slope), **look)
        start, above = left * (ridge / left) ** 0.06, slope * 1.12
        # the angle in data coordinates, along the line at the place of the text
        turned = {"rotation": math.degrees(math.atan(above)), "rotation_mode": "anchor"}
        label = f"copy, {short(slope * (1 if unit == 'GFLOP/s' else 1e3))} GB/s"
        panel.text(start, start * above, label, **turned, transform_rotates_text=True, **words)
    if peak and ridge < right:
        panel.plot((ridge, right), (peak, peak), **look)
        panel.text(right, peak * 1.06, f"bare products, {short(peak)} {unit} ", ha="right", **words)
    panel.set_xlim(left, right)


def ground(panel: Any, cases: list[Case]) -> None:
    """Write the numbers of tokens of the points above the axis, where there is room."""
    places = {
        n: [math.log(intensity(case)) for case in cases if case.tokens == n]
        for n in {c.tokens for c in cases}
    }
    left, right = panel.get_xlim()
    last = -math.inf
    for tokens, logs in sorted(places.items()):
        middle = sum(logs) / len(logs)
        if middle - last > 0.11 * math.log(right / left):
            words = f"{tokens:,} token{'s' * (tokens != 1)}"
            panel.text(
                math.exp(middle),
                0.015,
                words,
                transform=panel.get_xaxis_transform(),
                ha="center",
                color="#666666",
                size=8,
            )
            last = middle
