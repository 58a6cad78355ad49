"""Reroute the feed-forward blocks of any model through the op, in place, and undo it.

A block is found by its structure: products of fitting shapes, one after the other in the code of one module.
`probe` identifies the code between the products. Before a module is rerouted, its outputs and input gradients
are compared with the old ones. A block that differs, or that is not understood, is left as it is.
"""

import re

from torch import nn

from ffn.interop.swap.discover import has_block_shape, plans, reason_not_found
from ffn.interop.swap.proof import compare
from ffn.interop.swap.report import BlockReport, Report, describe
from ffn.interop.swap.reroute import PLAN, Plan, Rerouted, origin, reroute, restore

EXPERTS = re.compile(r"(gate|up|down)_proj$|^w[123]|^mlp")


def swap(
    model: nn.Module,
    *,
    save: str = "preact",
    chunk_tokens: int | None = None,
    backend: str = "auto",
    dry_run: bool = False,
) -> Report:
    """Reroute the feed-forward blocks of `model`, any torch module, through `ffn.feed_forward`, in place.

    Children, names, state dict, hooks, base classes and parameters stay the same. When a LoRA adapter, a hook
    or a quantized weight is put on a block later, that block runs its old code. Globals that the old code
    reads must keep their values.

    Args:
        save, chunk_tokens, backend: as for `ffn.feed_forward`.
        dry_run: report only; change nothing.

    Returns:
        One `BlockReport` per feed-forward block: swapped, or left with the reason; and the bytes of
        activations saved for backward per token, before and after. `print(report)` shows a table.

    Raises:
        TypeError: model is not an nn.Module.
        ValueError: an option is invalid. The model is unchanged.

    >>> layer = nn.TransformerEncoderLayer(8, 2, 32)
    >>> [block.action for block in swap(layer)]
    ['swapped']
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    found = []
    for path, module in model.named_modules():
        if examined := _examine(path, module, save, chunk_tokens, backend):
            found.append((module, *examined))
    for module, plan, _ in found:  # after all are examined, so that an error changes nothing
        if plan is not None and not dry_run:
            reroute(module, plan)
    return Report([block for *_, block in found])


def unswap(model: nn.Module) -> int:
    """Undo `swap` and return the number of blocks restored.

    Raises:
        RuntimeError: something else changed the class of a block after `swap` (FSDP2 does). The model is
            unchanged.
    """
    rerouted = [module for module in model.modules() if isinstance(module, Rerouted)]
    for module in rerouted:
        origin(module)  # raises before any block is changed
    for module in rerouted:
        restore(module)
    return len(rerouted)


def _examine(path, module, save, chunk_tokens, backend) -> tuple[Plan | None, BlockReport] | None:
    """Return the plan for a module and its entry in the report; None if the module has no block."""
    name = type(module).__name__
    if type(module).__module__.startswith("ffn.") or "Attention" in name:
        return None
    if isinstance(module, Rerouted):
        now, plan = (save, chunk_tokens, backend), vars(module).get(PLAN)
        other = plan is not None and now != (plan.save, plan.chunk_tokens, plan.backend)
        reason = "already swapped with other options: call ffn.unswap first" if other else "already swapped"
        return None, BlockReport(path, name, "left", reason)
    if any(p.ndim == 3 and EXPERTS.search(key) for key, p in module.named_parameters(recurse=False)):
        return None, BlockReport(path, name, "left", "a mixture of experts")
    reason = None
    for plan in plans(module, save, chunk_tokens, backend):
        if "experts" in path.split("."):
            return None, BlockReport(path, name, "left", "one of a mixture of experts")
        kept = compare(module, plan) if isinstance(plan, Plan) else plan
        if isinstance(plan, Plan) and isinstance(kept, tuple):
            return plan, BlockReport(path, name, "swapped", "", describe(plan), *kept)
        reason = reason or str(kept)
    if not has_block_shape(module):
        return None
    return None, BlockReport(path, name, "left", reason or reason_not_found(module))
