"""What autograd keeps for backward, counted."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


def kept_for_backward(run: Callable[[], Tensor], parameters: Iterable[Tensor]) -> dict[torch.dtype, int]:
    """Elements of the unique storages that autograd keeps, by dtype, without those of the parameters."""
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = run()
    saved += held(y)
    known = {t.untyped_storage().data_ptr(): t for t in parameters}
    trained = [t for t in known.values() if t.requires_grad]
    torch.autograd.grad(y.sum(), trained, allow_unused=True)  # what is kept is enough
    storages = {t.untyped_storage().data_ptr(): t for t in saved}
    counts: dict[torch.dtype, int] = {}
    for pointer, t in storages.items():
        if pointer not in known:
            counts[t.dtype] = counts.get(t.dtype, 0) + t.untyped_storage().nbytes() // t.itemsize
    return counts


def held(y: Tensor) -> list[Tensor]:
    """Tensors that y's graph holds as attributes of `torch.autograd.Function`s, which no hook is told of."""
    nodes, new = set(), {y.grad_fn}
    while new:
        nodes |= new
        new = {node for one in new for node, _ in one.next_functions if node is not None} - nodes
    return [t for node in nodes for t in tree_leaves(getattr(node, "__dict__", {})) if isinstance(t, Tensor)]
