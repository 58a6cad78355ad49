"""The log of a training run: metrics.csv, timing.csv, samples.txt, loss.png, and lines or a bar on screen.

metrics.csv holds only values that are equal in equal runs, so that a resumed run ends with the same bytes;
times are in timing.csv. A value that was not measured at a step is empty.
"""

from __future__ import annotations

import csv
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

METRICS = ("step", "tokens", "lr", "train_loss", "val_loss", "grad_norm")
BASE_METRICS = (*METRICS, "base_val_loss")  # if the base's training text is known
TIMING = ("step", "train_seconds", "tokens_per_second")
SAMPLES = "samples.txt"


class Log:
    """The growing files of a run.

    Args:
        sizes: of the files at the checkpoint that the run resumes from, as `Log.sizes` returned them; the
            files are cut back to them. None starts new files.
        metrics: the columns of metrics.csv.
        say: is told if a file is shorter than its size.
    """

    def __init__(
        self,
        run: Path,
        sizes: Mapping[str, int] | None = None,
        metrics: tuple[str, ...] = METRICS,
        say: Callable[[str], None] = print,
    ) -> None:
        self._files, self._metrics = {}, metrics
        for name, columns in {"metrics.csv": metrics, "timing.csv": TIMING, SAMPLES: ()}.items():
            path = run / name
            left = 0
            if sizes is not None:
                told = path.read_bytes()[: sizes[name]] if path.exists() else b""
                left = told.rfind(b"\n") + 1  # in whole lines
                if left < sizes[name]:
                    say(f"{path}: {left} of {sizes[name]} bytes are left; the run resumes from there")
            if left:
                os.truncate(path, left)
            else:
                path.write_text(",".join(columns) + "\n" if columns else "", encoding="utf-8")
            self._files[name] = path.open("a", encoding="utf-8", newline="")

    def metrics(self, **values: Any) -> None:
        """Append a row to metrics.csv with the values of this log's columns; floats read back exactly."""
        self._row("metrics.csv", self._metrics, values)

    def timing(self, **values: Any) -> None:
        """Append a row to timing.csv."""
        self._row("timing.csv", TIMING, values)

    def sample(self, step: int, text: str) -> None:
        """Append a generated text to samples.txt."""
        self._files[SAMPLES].write(f"--- step {step}\n{text}\n\n")

    def _row(self, name: str, columns: tuple[str, ...], values: Mapping[str, Any]) -> None:
        cells = ["" if values[column] is None else repr(values[column]) for column in columns]
        self._files[name].write(",".join(cells) + "\n")

    def sizes(self) -> dict[str, int]:
        """Flush the files to the disk and return the bytes in each."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        return {name: file.tell() for name, file in self._files.items()}

    def close(self) -> None:
        """Close the files; rows since the last call of `sizes` may be lost on a full disk."""
        for file in self._files.values():
            with suppress(OSError):
                file.close()


class Screen:
    """Progress on screen: a bar if stderr is a terminal and tqdm is installed, else plain lines."""

    def __init__(self, say: Callable[[str], None], steps: int, step: int) -> None:
        self._say, self._steps, self._bar = say, steps, None
        if sys.stderr.isatty():
            try:
                from tqdm import tqdm
            except ImportError:
                say("no progress bar: tqdm is not installed; pip install 'torch-ffn[app]'")
            else:
                self._bar = tqdm(total=steps, initial=step, unit="step", dynamic_ncols=True)

    def step(self, loss: float, speed: float) -> None:
        """Advance the bar by one step; `speed` is in tokens/s."""
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} tokens/s", refresh=False)
            self._bar.update()

    def line(
        self,
        step: int,
        loss: float,
        val_loss: float | None,
        speed: float,
        left: float,
        base_loss: float | None = None,
    ) -> None:
        """Print the numbers of a step; beside a bar only those of an evaluation."""
        val = "" if val_loss is None else f"  val {val_loss:.4f}"
        val += "" if base_loss is None else f"  base's text {base_loss:.4f}"
        if self._bar is None:
            self.say(
                f"step {step}/{self._steps}  loss {loss:.4f}{val}  {speed:,.0f} tokens/s  {clock(left)} left"
            )
        elif val:
            self.say(f"step {step}/{self._steps}  loss {loss:.4f}{val}")

    def sample(self, text: str) -> None:
        """Print a generated text, indented."""
        self.say("\n".join(f"  | {line}" for line in printable(text).strip("\n").split("\n")))

    def say(self, text: str) -> None:
        """Print without breaking the bar."""
        if self._bar is None:
            self._say(text)
        else:
            self._bar.clear()
            self._say(text)
            self._bar.refresh()

    def close(self) -> None:
        """Close the bar and leave it on screen."""
        if self._bar is not None:
            self._bar.close()


def printable(text: str) -> str:
    """Replace characters that control a terminal, except line ends and tabs, by U+FFFD."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def clock(seconds: float) -> str:
    """Format seconds: 75.3 -> 1:15, 3675 -> 1:01:15."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def draw_loss(run: Path) -> str:
    """Draw loss.png from metrics.csv; return a line with its path, or with the missing package."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return "no loss.png: matplotlib is not installed; pip install 'torch-ffn[app]'"
    with (run / "metrics.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="step", ylabel="loss, nats a token")
    curves = [("train_loss", "training", "-"), ("val_loss", "validation", "o-")]
    for column, label, style in [*curves, ("base_val_loss", "validation, the base's text", "s--")]:
        points = [(int(row["step"]), float(row[column])) for row in rows if row.get(column)]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, linewidth=1, markersize=4)
    if rows:
        axes.legend()
    figure.savefig(run / "loss.png", dpi=120)
    return f"loss curve   {run / 'loss.png'}"


def closing_lines(run: Path, summary: Mapping[str, Any]) -> Iterator[str]:
    """Yield the last lines of the log: results, files, and the commands that use them."""
    tokens, seconds = summary["tokens"], summary["train_seconds"]
    speed = f"{tokens / max(seconds, 1e-9):,.0f} tokens/s"
    yield f"{summary['stopped']:12} {summary['steps']} steps, {tokens:,} tokens, {speed}"
    yield f"training     {seconds:.1f} s, compilation counted, evaluation and saving not"
    if summary["best_val_loss"] is not None:
        best = f"{summary['best_val_loss']:.4f} nats a token, by {summary['best_checkpoint']}"
        yield f"validation   {best}, the best"
    if (now := summary.get("base_val_loss")) is not None:
        yield f"base's text  {now:.4f} nats a token, {summary['base_val_loss_before']:.4f} before"
    yield draw_loss(run)
    yield f"saved        {run}: checkpoints, metrics.csv, samples.txt, config.toml, summary.json"
    if "adapters" in summary:
        yield f"adapters     {run / summary['adapters']}, for ffn.gpt.adapters.load_adapters"
    yield f"generate     ffn generate {run}"
    if summary["stopped"] == "interrupted":
        yield "resume       with the same command"
