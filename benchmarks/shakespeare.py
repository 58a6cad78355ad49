"""Character-level Shakespeare in equal wall-clock time: `ffn train` and nanoGPT's published CPU recipe.

python -m benchmarks shakespeare FILE              FILE is the text, 1.1 MB of plays
python -m benchmarks shakespeare FILE --steps 20 --ffn train.steps=20       a quick look

The recipe for the plain GPT: 4 layers, 4 heads, width 128, window 64, batch 12, AdamW 1e-3 decaying by a
cosine to 1e-4 over all 2,000 steps after 100 of warm-up, betas 0.9 and 0.99, weight decay 0.1, clipping at 1,
no dropout, float32, eager. Seconds count training and compilation (from an empty cache) but not evaluation.
The loss is in nats per character over the last tenth of the text, in adjacent full windows.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.baseline import GPT
from benchmarks.report import arguments, publish

COLUMNS = ["implementation", "steps", "parameters", "seconds", "process_s", "val_loss"]
WINDOW, BATCH = 64, 12
PEAK, FLOOR, WARMUP = 1e-3, 1e-4, 100


def split(text: str) -> tuple[str, str]:
    cut = int(0.9 * len(text))
    return text[:cut], text[cut:]


def learning_rate(step: int, steps: int) -> float:
    if step < WARMUP:
        return PEAK * (step + 1) / (WARMUP + 1)
    done = (step - WARMUP) / max(1, steps - WARMUP)
    return FLOOR + 0.5 * (1 + math.cos(math.pi * done)) * (PEAK - FLOOR)


def train_baseline(tokens: Tensor, vocab_size: int, steps: int, seed: int) -> tuple[GPT, float]:
    """Train by the recipe; return the model and the seconds."""
    torch.manual_seed(seed)
    model = GPT(vocab_size, 128, 4, 4, WINDOW, bias=False)
    optimizer = torch.optim.AdamW(model.parameter_groups(0.1), betas=(0.9, 0.99))
    offsets = torch.arange(WINDOW)
    start = time.perf_counter()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        at = torch.randint(len(tokens) - WINDOW, (BATCH, 1)) + offsets
        model(tokens[at], tokens[at + 1]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return model.eval(), time.perf_counter() - start


@torch.no_grad()
def validation_loss(logits_of: Callable[[Tensor], Tensor], tokens: Tensor, window: int) -> float:
    """Return the mean nats per token over full adjacent windows; a shorter rest of the text is left out."""
    count = (len(tokens) - 1) // window
    inputs = tokens[: count * window].view(count, window)
    targets = tokens[1 : count * window + 1].view(count, window)
    total = 0.0
    for x, y in zip(inputs.split(64), targets.split(64), strict=True):
        logits = logits_of(x).flatten(0, 1).float()
        total += F.cross_entropy(logits, y.flatten(), reduction="sum").item()
    return total / (count * window)


def run_baseline(text: str, steps: int, seed: int) -> dict:
    alphabet = {character: i for i, character in enumerate(sorted(set(text)))}
    train, val = (torch.tensor([alphabet[c] for c in part]) for part in split(text))
    model, seconds = train_baseline(train, len(alphabet), steps, seed)
    row = {"implementation": "nanoGPT's recipe, plain torch", "steps": steps, "seconds": seconds}
    row["parameters"] = sum(p.numel() for p in model.parameters())
    return row | {"val_loss": validation_loss(model, val, WINDOW)}


def run_ffn(path: Path, text: str, words: list[str]) -> dict:
    """Run `ffn train configs/shakespeare.toml` in a fresh process with an empty compilation cache."""
    import ffn

    root = Path(__file__).parents[1]
    with tempfile.TemporaryDirectory() as scratch:
        run = Path(scratch) / "run"
        command = [sys.executable, "-m", "ffn", "train", str(root / "configs" / "shakespeare.toml")]
        command += [f"data.path={path}", f"out={run}", *words]
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(Path(scratch) / "inductor")}
        start = time.perf_counter()
        subprocess.run(command, cwd=root, env=environment, check=True, stdout=sys.stderr)
        process_s = time.perf_counter() - start
        summary = json.loads((run / "summary.json").read_text())
        model = ffn.load(run)
        tokens = torch.tensor(ffn.load_tokenizer(run).encode(split(text)[1]))
        loss = validation_loss(model, tokens, model.config.max_seq_len)
    row = {"implementation": "ffn train", "steps": summary["steps"], "seconds": summary["train_seconds"]}
    row["parameters"] = sum(p.numel() for p in model.parameters())
    return row | {"process_s": process_s, "val_loss": loss}


def main(argv: list[str]) -> None:
    parser = arguments("shakespeare", __doc__)
    parser.add_argument("text", type=Path)
    parser.add_argument("--steps", type=int, default=2000, help="steps of the baseline")
    parser.add_argument("--seed", type=int, default=1337)
    parser.add_argument(
        "--ffn", nargs="*", default=[], metavar="KEY=VALUE", help="more arguments of ffn train"
    )
    options = parser.parse_args(argv)
    text = options.text.read_text("utf-8")
    rows = [
        run_baseline(text, options.steps, options.seed),
        run_ffn(options.text.resolve(), text, options.ffn),
    ]
    publish("shakespeare", rows, COLUMNS, options.out)
