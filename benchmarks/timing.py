"""Timing and counting: interleaved rounds, medians, ratios within a round, saved bytes, peak memory.

Candidates take turns in one process, in an order shuffled each round, so that a slow minute of the machine
affects all of them. The result is the ratio of medians with a bootstrap interval over the rounds.
"""

import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Run = Callable[[], object]
FLUSH_BYTES = 256 << 20  # more than the L2 cache of any GPU
HEAD_START = 4_000_000  # GPU cycles, about 2 ms


def twice_the_cache(caches: Path) -> int:
    """Return twice the size of a core's largest cache, at least 64 MiB."""
    sizes = [int(file.read_text().strip().removesuffix("K")) << 10 for file in caches.glob("index*/size")]
    return max([64 << 20, *(2 * size for size in sizes)])


CACHE_BYTES = twice_the_cache(Path("/sys/devices/system/cpu/cpu0/cache"))


def host_seconds(run: Run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


class GpuClock:
    """Measure the GPU seconds of a call between two events.

    First other data is read into the cache, as in real use; reading leaves nothing to write back during the
    call. Then the GPU idles while the host queues the call's launches, so that only the kernels are timed;
    `back_to_back` shows the host's time.
    """

    def __init__(self, device: torch.device):
        self.buffer = torch.zeros(FLUSH_BYTES // 4, dtype=torch.float32, device=device)

    def __call__(self, run: Run) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self.buffer.sum()
        torch.cuda._sleep(HEAD_START)
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


class Rotation:
    """Call equal blocks in turn, as a model does, so that none finds its weights in the cache."""

    def __init__(self, runs: list[Run]):
        self.runs, self.turns = runs, cycle(runs)

    def __call__(self) -> None:
        next(self.turns)()


def clock_of(device: torch.device, cold: bool = False, warm: bool = False) -> Callable[[Run], float]:
    """Return the device's clock. On the CPU, `cold` fills the cache with other data before each call (before
    each round of a rotation); `warm` keeps the data of the previous call and averages a few calls."""
    if device.type == "cuda":
        return GpuClock(device)
    if warm:
        return lambda run: back_to_back(run, device)
    if not cold:
        return host_seconds
    buffer = torch.zeros(CACHE_BYTES // 4, dtype=torch.float32)

    def seconds(run: Run) -> float:
        buffer.sum()
        if not isinstance(run, Rotation):
            return host_seconds(run)
        run()  # brings the code into the cache, as in a model, but not the next blocks' weights
        calls = max(1, len(run.runs) - 1)
        return host_seconds(lambda: [run() for _ in range(calls)]) / calls

    return seconds


def measure(
    candidates: Mapping[str, Run],
    *,
    rounds: int,
    warmup: int = 2,
    seed: int = 0,
    clock: Callable[[Run], float] = host_seconds,
) -> dict[str, list[float]]:
    """Return the seconds of each candidate in each round, by name."""
    order = random.Random(seed)
    names = list(candidates)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for round_number in range(-warmup, rounds):
        order.shuffle(names)
        for name in names:
            elapsed = clock(candidates[name])
            if round_number >= 0:
                seconds[name].append(elapsed)
    return {name: seconds[name] for name in candidates}


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Return lower quartile, median and upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def speedup(base: list[float], other: list[float], *, draws: int = 2000) -> tuple[float, float, float]:
    """Return how many times faster `other` is than `base`: ratio of medians, 95% bootstrap interval."""
    rounds, draw = list(zip(base, other, strict=True)), random.Random(0)

    def ratio(chosen: list[tuple[float, float]]) -> float:
        first, second = zip(*chosen, strict=True)
        return statistics.median(first) / statistics.median(second)

    drawn = sorted(ratio(draw.choices(rounds, k=len(rounds))) for _ in range(draws))
    return ratio(rounds), drawn[int(0.025 * draws)], drawn[int(0.975 * draws)]


def comparison(base: list[float] | None, other: list[float]) -> dict[str, float]:
    """Return the timing columns of `other`: median and spread in ms, and any speedup over `base`."""
    first, median, third = quartiles(other)
    row = {"ms": 1e3 * median, "iqr": 1e3 * (third - first)}
    if base is not None:
        row["speedup"], row["low"], row["high"] = speedup(base, other)
    return row


def saved_bytes(forward: Callable[[], Tensor], owned: Iterable[Tensor]) -> int:
    """Return the bytes that autograd saves for backward: each storage once, without `owned` tensors."""
    kept: list[Tensor] = []  # keeps the tensors alive, so that no address is reused
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.detach()) or t, lambda t: t):
        output = forward()
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in [*kept, *held(output)]}
    return sum(sizes[address] for address in sizes.keys() - {t.untyped_storage().data_ptr() for t in owned})


def held(output: Tensor) -> list[Tensor]:
    """Return tensors stored as attributes of autograd Functions in the graph, which hooks do not see."""
    nodes, new = set(), {output.grad_fn} - {None}
    while new:
        nodes |= new
        new = {node for one in new for node, _ in one.next_functions} - nodes - {None}
    return [t for node in nodes for t in tree_leaves(getattr(node, "__dict__", {})) if isinstance(t, Tensor)]


def back_to_back(run: Run, device: torch.device, calls: int = 10) -> float:
    """Return seconds per call by the host's clock, without pauses: shows slow launching."""

    def burst() -> None:
        for _ in range(calls):
            run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    burst()
    return host_seconds(burst) / calls


def memory_of(t: Tensor) -> tuple[int, Any, int]:
    """Return (address, weak reference, bytes) of the storage or, if oneDNN hides it, of the tensor."""
    if t.is_mkldnn:
        return id(t), torch._C._WeakTensorRef(t), t.numel() * t.element_size()
    storage = t.untyped_storage()
    return storage._cdata, StorageWeakRef(storage), storage.nbytes()


class Allocations(TorchDispatchMode):
    """Count the live bytes of tensors that ops create in this mode, and their peak.

    Memory that an op allocates and frees internally is not counted, nor is compiled code.
    """

    def __init__(self):
        super().__init__()
        self.alive: dict[int, tuple[Any, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        known = {memory_of(t)[0] for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = op(*args, **(kwargs or {}))
        self.alive = {key: held for key, held in self.alive.items() if not held[0].expired()}
        for key, reference, nbytes in (memory_of(t) for t in tree_leaves(out) if isinstance(t, Tensor)):
            if key not in known:
                self.alive[key] = reference, nbytes
        self.peak = max(self.peak, sum(nbytes for _, nbytes in self.alive.values()))
        return out


def peak_bytes(run: Run, device: torch.device) -> int:
    """Return the peak memory of a call beyond what was held before; on the CPU `Allocations` counts it."""
    if device.type != "cuda":
        with Allocations() as allocations:
            run()
        return allocations.peak
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def relative_error(out: Tensor, exact: Tensor) -> float:
    """Return ||out - exact|| / ||exact||."""
    return ((out.to(exact.dtype) - exact).norm() / exact.norm()).item()


def worst(errors: Iterable[float]) -> float:
    """Return the largest error, or NaN if there is one."""
    return max(errors, key=lambda error: (error != error, error))
