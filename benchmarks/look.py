"""The look of pictures: a style per implementation, headings with legends, plain numbers on axes."""

import math
from collections.abc import Iterable, Iterator, Sequence
from io import BytesIO
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.cases import BASELINE, CEILING
from ffn.files import atomic

WIDTH, DPI = 8.0, 150  # inches; text is sized to be read at 800 pixels
GREY, LIMIT = "#8a8a8a", "#222222"
SETTINGS = {
    "text.parse_math": False,  # show a dollar in a name as it is
    "font.size": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#999999",
    "axes.axisbelow": True,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "ytick.major.size": 0,
}

# Okabe and Ito's colours, distinguishable with every kind of colour vision, and a few similar ones. Blues are
# for ffn. Implementations with the same colour have different markers or never share a picture.
LOOKS = {
    "ffn": ("#0072B2", "o"),
    "ffn save=input": ("#56B4E9", "s"),
    "ffn packed": ("#1B2A6B", "p"),
    "ffn int8": ("#00A3B5", "H"),
    "ffn triton": ("#3C5A78", "o"),
    "ffn eager": ("#7A8FD6", "s"),
    "ffn compiled": ("#00A3B5", "D"),
    "ffn fused": ("#1B2A6B", "H"),
    "ffn unfused": ("#56B4E9", "p"),
    BASELINE: (GREY, "h"),
    "torch.compile": ("#D55E00", "D"),
    "torch max-autotune": ("#E69F00", "^"),
    "TransformerEncoderLayer": ("#7F3C1E", "v"),
    "transformers": ("#CC79A7", "P"),
    "hf GPT2MLP": ("#CC79A7", "P"),
    "hf LlamaMLP": ("#CC79A7", "X"),
    "x-transformers": ("#5B2A86", ">"),
    "timm": ("#B3A100", "<"),
    "liger": ("#009E73", "v"),
    "liger fused": ("#66C2A5", "^"),
    "liger tiled": ("#00583F", "d"),
    "quack": ("#111111", "P"),
    "quack tuned": ("#7F3C1E", "X"),
    "torchao float8": ("#CC79A7", "*"),
}
SPARE_OURS = (("#3C5A78", "s"), ("#7A8FD6", "o"), ("#00A3B5", "p"), ("#0072B2", "H"))
SPARE = (("#D55E00", "d"), ("#009E73", ">"), ("#5B2A86", "v"), ("#E69F00", "<"), ("#111111", "D"))


class Picture(NamedTuple):
    name: str
    figure: Any
    caption: str


Pictures = Iterator[Picture]


class Style(NamedTuple):
    colour: str
    marker: str
    ours: bool


def styles_of(names: Iterable[str]) -> dict[str, Style]:
    """Return a style per implementation, ours first; a name that LOOKS lacks gets a spare style."""
    unknown = sorted({*names} - {*LOOKS, CEILING}, key=lambda name: (not is_ours(name), name))
    spare = {True: cycle(SPARE_OURS), False: cycle(SPARE)}
    looks = LOOKS | {name: next(spare[is_ours(name)]) for name in unknown}
    ordered = sorted(looks, key=lambda name: not is_ours(name))
    return {name: Style(*looks[name], is_ours(name)) for name in ordered}


def is_ours(name: str) -> bool:
    return name.split(maxsplit=1)[:1] == ["ffn"]


def dot(style: Style) -> dict[str, Any]:
    """Return the options of a point; ours are larger."""
    look = {"color": style.colour, "marker": style.marker, "markeredgecolor": "white"}
    return look | {"markersize": 6.5 if style.ours else 5.2, "markeredgewidth": 0.5, "linestyle": "none"}


def words_of(style: Style) -> dict[str, Any]:
    """Return the options of the value at the end of a bar; ours are bold."""
    look = {"weight": "bold", "color": "#222222"} if style.ours else {"color": "#444444"}
    return look | {"size": 7.5, "va": "center"}


def sheet(title: str, hint: str, handles: Sequence[Any], height: float) -> tuple[Any, Any]:
    """Return a figure with heading, legend and foot, and its middle part of `height` inches to draw in."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    head, foot = 0.64 + 0.2 * math.ceil(len(handles) / 4), 0.2
    figure = Figure((WIDTH, head + height + foot), layout="constrained")
    FigureCanvasAgg(figure)
    top, body, _ = figure.subfigures(3, 1, height_ratios=[head, height, foot])
    top.text(0.012, 1 - 0.10 / head, title, size=12, weight="bold", va="top")
    top.text(0.012, 1 - 0.34 / head, hint, size=9, color="#444444", va="top")
    if handles:
        corner = (0.004, 1 - 0.52 / head)
        top.legend(handles=handles, loc="upper left", bbox_to_anchor=corner, ncols=4, frameon=False)
    return figure, body


def legend(names: Iterable[str], styles: dict[str, Style], **options: Any) -> list[Any]:
    """Return the legend entries of these implementations, ours first."""
    from matplotlib.lines import Line2D

    named = {*names}
    looks = {name: dot(style) | {"markersize": 6} for name, style in styles.items() if name in named}
    return [Line2D([], [], label=name, **(look | options)) for name, look in looks.items()]


def limit_handle() -> Any:
    """Return the legend entry of the ceiling; it can be exceeded, so it is not called a limit."""
    from matplotlib.lines import Line2D

    mark = {"marker": "|", "markersize": 10, "markeredgewidth": 1.6, "linestyle": "none"}
    return Line2D([], [], color=LIMIT, label="yardstick: bare products", **mark)


def grid(body: Any, count: int, columns: int, **options: Any) -> list[Any]:
    """Return `count` axes in rows of at most `columns`."""
    columns = min(columns, count)
    axes = body.subplots(math.ceil(count / columns), columns, squeeze=False, **options).flatten().tolist()
    for spare in axes[count:]:
        spare.remove()
    return axes[:count]


def without_axis(panel: Any) -> None:
    """Remove the horizontal axis: each bar shows its value."""
    panel.set_xticks([])
    panel.spines["bottom"].set_visible(False)


def short(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def plain_ticks(axis: Any, most: int = 8, unit: str = "") -> None:
    """Put at most `most` round numbers on a logarithmic axis, in plain notation."""
    low, high = axis.get_view_interval()
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    fine = (1, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8, 1.9, 2, 2.5, 3, 4, 5, 6, 7, 8, 9)
    ticks: list[float] = []
    for steps in (fine, (1, 1.2, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        ticks = [step * 10.0**power for power in powers for step in steps]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) <= most:
            break
    fixed_ticks(axis, ticks[:: math.ceil(len(ticks) / most) or 1], unit)


def spaced(counts: Sequence[int], width: float) -> list[int]:
    """Return those ascending counts whose labels do not overlap on a logarithmic axis of `width` inches.

    The first and the last count are always included.
    """
    first, last = counts[0], counts[-1]

    def apart(left: int, right: int) -> bool:
        label = 0.07 * (len(short(left)) + len(short(right))) / 2
        return 0.9 * width * math.log(right / left) / math.log(last / first) > label + 0.06

    kept = [last]
    for count in counts[-2:0:-1]:
        if apart(count, kept[-1]) and apart(first, count):
            kept.append(count)
    return [first, *reversed(kept)]


def fixed_ticks(axis: Any, ticks: Sequence[float], unit: str = "") -> None:
    axis.set_ticks(ticks, [short(tick) + unit for tick in ticks])
    axis.set_ticks([], minor=True)


def save(figure: Any, path: Path, foot: str) -> None:
    """Write the picture with `foot` as its last line."""
    figure.subfigs[-1].text(0.988, 0.45, foot, size=7, color="#777777", ha="right", va="center")
    content = BytesIO()
    figure.savefig(content, format="png", dpi=DPI)
    atomic.write_file(path, content.getvalue())
