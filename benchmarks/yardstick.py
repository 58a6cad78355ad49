"""The yardstick of a case, row "ceiling": its bare matmuls, with gate and up joined or separate, whichever is
faster. With few tokens it is the time to read the weights at the speed of a copy, if that is longer.
"""

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from statistics import median

import torch
from torch import Tensor

from benchmarks.cases import CEILING, Case
from benchmarks.plain import Weights
from benchmarks.timing import CACHE_BYTES, Rotation, Run
from ffn.ops import hardware
from ffn.ops.matmul import float32_in_onednn

FEW = 64  # up to so many tokens reading the weights may take longer than the matmuls


def fast_products(x: Tensor) -> AbstractContextManager:
    """Context: bare matmuls of x's dtype and device run in the fastest library."""
    onednn = x.is_cpu and x.dtype == torch.float32 and hardware.float32_faster_in_onednn()
    return float32_in_onednn() if onednn else nullcontext()


def products(case: Case, x: Tensor, dy: Tensor, joined: bool) -> Run:
    """Return the bare matmuls of the case on operands of their shapes, gate and up joined or separate."""
    block, dtype = case.block, torch.float32 if case.dtype == "float32" else torch.bfloat16
    new = partial(torch.randn, dtype=dtype, device=x.device)
    parts, width = (1, 2 * block.hidden_dim) if joined else (1 + block.gated, block.hidden_dim)
    ups, down = [new(width, block.dim) for _ in range(parts)], new(block.dim, block.hidden_dim)
    h, pres = new(case.tokens, block.hidden_dim), [new(case.tokens, width) for _ in range(parts)]
    x, dy = x.detach().to(dtype), dy.to(dtype)

    @torch.no_grad()
    def run() -> None:
        with fast_products(x):
            _ = [x @ up.t() for up in ups], h @ down.t()
            if case.work == "training":
                _ = (
                    dy @ down,
                    dy.t() @ h,
                    [(pre.t() @ x, pre @ up) for pre, up in zip(pres, ups, strict=True)],
                )

    return run


def copied_bytes(device: torch.device) -> int:
    """Return the bytes of the copy that measures memory speed: more than a cache holds."""
    return 1 << (30 if device.type == "cuda" else 27)


def copying(device: torch.device) -> Run:
    source = torch.ones(copied_bytes(device), dtype=torch.uint8, device=device)
    return partial(torch.empty_like(source).copy_, source)


def reads_weights(case: Case, x: Tensor) -> bool:
    """Return True if reading the weights takes the time; then blocks are timed in turn, to read them."""
    return x.is_cpu and case.work == "inference" and case.tokens <= FEW


def blocks_of(weights: Weights) -> int:
    """Return one more than the number of blocks that exceeds the cache; 1 for toy blocks."""
    size = sum(w.nbytes for w in weights.values())
    return 1 + CACHE_BYTES // size if size >= 1 << 20 else 1


def yardsticks(case: Case, weights: Weights, x: Tensor, dy: Tensor) -> dict[str, Run]:
    """Return the candidates for the row "ceiling"."""
    runs: dict[str, Run] = {}
    for form in ("apart", "joined") if case.block.gated else ("apart",):
        count = blocks_of(weights) if reads_weights(case, x) else 1
        each = [products(case, x, dy, joined=form == "joined") for _ in range(count)]
        runs[f"{CEILING} {form}"] = Rotation(each) if count > 1 else each[0]
    if case.work == "inference" and case.tokens <= FEW:
        runs[f"{CEILING} copy"] = copying(x.device)
    return runs


def yardstick(case: Case, weights: Weights, taken: dict[str, list[float]]) -> tuple[list[float], dict] | None:
    """Remove the yardsticks from `taken`; return (seconds per round, rates), or None if one failed."""
    found = {name: taken.pop(name) for name in list(taken) if name.startswith(CEILING)}
    copy = found.pop(f"{CEILING} copy", None)
    if not found:
        return None
    best, rate = min(found.values(), key=median), {}
    if copy is not None:
        read = sum(w.nbytes for w in weights.values())
        moved = 2 * copied_bytes(weights["up_proj.weight"].device)  # read and written
        copy = [read / moved * s for s in copy]
        rate["gbs"] = read / median(copy) / 1e9
        if median(copy) > median(best):
            return copy, rate
    return best, rate | {"tflops": case.flops / median(best) / 1e12}
