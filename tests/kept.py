"""Count the elements that autograd saves for backward."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from benchmarks.timing import held


def kept_for_backward(run: Callable[[], Tensor], parameters: Iterable[Tensor]) -> dict[torch.dtype, int]:
    """Return the elements of the unique saved storages by dtype, without parameters."""
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = run()
    saved += held(y)
    known = {t.untyped_storage().data_ptr(): t for t in parameters}
    trained = [t for t in known.values() if t.requires_grad]
    torch.autograd.grad(y.sum(), trained, allow_unused=True)  # backward works with the saved tensors
    storages = {t.untyped_storage().data_ptr(): t for t in saved}
    counts: dict[torch.dtype, int] = {}
    for pointer, t in storages.items():
        if pointer not in known:
            counts[t.dtype] = counts.get(t.dtype, 0) + t.untyped_storage().nbytes() // t.itemsize
    return counts
