"""Measure the memory to load a checkpoint, a random Llama in safetensors shards: ffn and transformers.

python -m benchmarks loading                a gigabyte of float32 in four shards
python -m benchmarks loading --mib 256

Each loads in its own process, which first loads a tiny model so that imports and pools do not count. Memory
held before is subtracted. `anon_MB` is the peak of allocated memory (RssAnon, sampled every millisecond); it
excludes pages of mapped files, which the system can take back. `peak_MB` is the peak of resident memory
including these pages (VmHWM, counted by the kernel). `used_MB` is the resident memory after every weight was
read: transformers leaves weights of the wanted dtype in their mapped files (which must not change during the
model's life) and reads them on use. Linux only.
"""

import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import nn

from benchmarks.report import arguments, publish
from ffn.gpt.transformer import Transformer, TransformerConfig
from ffn.interop.hf.folder import load_folder, save_folder

COLUMNS = [
    "implementation",
    "model_MB",
    "largest_MB",
    "anon_MB",
    "anon_ratio",
    "peak_MB",
    "used_MB",
    "seconds",
]
ROOT = Path(__file__).parents[1]
MB = 1e6


def write(folder: Path, dim: int, size: int, shards: int = 4) -> dict:
    """Write a random float32 model of about `size` bytes and a tiny one in `folder/tiny`; return the size."""
    tiny = TransformerConfig(16, dim=16, num_layers=1, num_heads=2, hidden_dim=16, tie_embeddings=False)
    save_folder(folder / "tiny", Transformer(tiny))
    vocab_size, hidden = 8 * dim, 11 * dim // 4
    layers = (size // 4 - 2 * vocab_size * dim) // (4 * dim * dim + 3 * dim * hidden)
    config = TransformerConfig(
        vocab_size, dim=dim, num_layers=layers, num_heads=dim // 64, hidden_dim=hidden, tie_embeddings=False
    )
    model = Transformer(config)
    sizes = [tensor.nbytes for tensor in model.parameters()]
    save_folder(folder, model, max_shard_bytes=sum(sizes) // shards + max(sizes))
    return {"model_MB": sum(sizes) / MB, "largest_MB": max(sizes) / MB}


def load_with_transformers(folder: Path, dtype: torch.dtype | None = None) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or "auto")


LOADERS: dict[str, Callable[[Path], nn.Module]] = {
    "ffn": load_folder,
    "transformers": load_with_transformers,
    "ffn, to bfloat16": partial(load_folder, dtype=torch.bfloat16),
    "transformers, to bfloat16": partial(load_with_transformers, dtype=torch.bfloat16),
}


def resident(key: str) -> int:
    """Return RssAnon, VmRSS or VmHWM of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {key}")


@contextmanager
def sampled(key: str) -> Iterator[list[int]]:
    """Yield a list of one number: the largest value during the context."""
    most, done = [resident(key)], threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            most[0] = max(most[0], resident(key))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield most
    finally:
        done.set()
        thread.join()
        most[0] = max(most[0], resident(key))


def measure_here(name: str, folder: Path) -> dict:
    """Load in this process, which should be fresh."""
    load = LOADERS[name]
    load(folder / "tiny")
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    anon, rss, start = resident("RssAnon"), resident("VmRSS"), time.perf_counter()
    with sampled("RssAnon") as most:
        model = load(folder)
    seconds = time.perf_counter() - start
    row = {"anon_MB": (most[0] - anon) / MB, "peak_MB": (resident("VmHWM") - rss) / MB, "seconds": seconds}
    for parameter in model.parameters():
        parameter.detach().max()
    gc.collect()
    return row | {"used_MB": (resident("VmRSS") - rss) / MB}


def measure(name: str, folder: Path) -> dict:
    """Do the same in a new process."""
    command = [sys.executable, "-m", "benchmarks.loading", name, str(folder)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"implementation": name, "note": done.stderr.strip().splitlines()[-1]}
    return {"implementation": name, **json.loads(done.stdout.splitlines()[-1])}


def main(argv: list[str]) -> None:
    parser = arguments("loading", __doc__)
    parser.add_argument("--mib", type=int, default=1024, help="MiB of weights")
    parser.add_argument("--dim", type=int, default=1024, help="width; the token table is 8 times as long")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        facts = write(Path(scratch), options.dim, options.mib * 2**20)
        rows = [measure(name, Path(scratch)) | facts for name in LOADERS]
    for row in rows:
        if "anon_MB" in row:
            row["anon_ratio"] = row["anon_MB"] / row["model_MB"]
    publish("loading", rows, [*COLUMNS, "note"], options.out)


if __name__ == "__main__":
    print(json.dumps(measure_here(sys.argv[1], Path(sys.argv[2]))))
