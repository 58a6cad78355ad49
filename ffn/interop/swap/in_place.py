"""Give the feed-forward blocks of any model the lean op, in place, and take it back.

A block is found by structure: products of fitting shapes, one after the other in the code of one module.
What lies between them is identified by probing (see `ffn.interop.swap.probe`), and before the module is
rerouted its output and input gradient are compared with the old ones. What differs, or is not understood,
stays.
"""

import re

from torch import nn

from ffn.interop.swap.discover import NOT_FOUND, has_block_shape, plans
from ffn.interop.swap.proof import compare
from ffn.interop.swap.report import Block, Report, describe
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

    Children, names, state dict, hooks, base classes and parameters stay what they are, and a LoRA adapter, a
    hook or a quantized weight put on a block later takes effect: there the old code runs. Globals that it
    reads are taken to stay what they are now.

    Args:
        save, chunk_tokens, backend: as for `ffn.feed_forward`.
        dry_run: only report.

    Returns:
        For each block what was done, or why not, and the bytes of activations a token keeps for backward
        before and after. `print(report)` shows a table.

    Raises:
        TypeError: no torch module. ValueError: options that make no sense. The model is then as it was.

    >>> layer = nn.TransformerEncoderLayer(8, 2, 32)
    >>> [block.action for block in swap(layer)]
    ['swapped']
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"swap wants a torch module; got a {type(model).__name__}")
    found = []
    for path, module in model.named_modules():
        if examined := _examine(path, module, save, chunk_tokens, backend):
            found.append((module, *examined))
    for module, plan, _ in found:  # after all were examined: an error above leaves the model as it was
        if plan is not None and not dry_run:
            reroute(module, plan)
    return Report([block for *_, block in found])


def unswap(model: nn.Module) -> int:
    """Undo `swap`; returns how many blocks were rerouted.

    Raises:
        RuntimeError: a block's class was changed since by something else (FSDP2 does); nothing is changed.
    """
    rerouted = [module for module in model.modules() if isinstance(module, Rerouted)]
    for module in rerouted:
        origin(module)  # a look at all of them before the first is changed
    for module in rerouted:
        restore(module)
    return len(rerouted)


def _examine(path, module, save, chunk_tokens, backend) -> tuple[Plan | None, Block] | None:
    """The plan for a module and its line in the report; None if no block is to be seen in it."""
    name = type(module).__name__
    if type(module).__module__.startswith("ffn.") or "Attention" in name:
        return None
    if isinstance(module, Rerouted):
        now, plan = (save, chunk_tokens, backend), vars(module).get(PLAN)
        other = plan is not None and now != (plan.save, plan.chunk_tokens, plan.backend)
        reason = "swapped before, with other options: unswap first" if other else "swapped before"
        return None, Block(path, name, "left", reason)
    if any(p.ndim == 3 and EXPERTS.search(key) for key, p in module.named_parameters(recurse=False)):
        return None, Block(path, name, "left", "a mixture of experts")
    reason = None
    for plan in plans(module, save, chunk_tokens, backend):
        if "experts" in path.split("."):
            return None, Block(path, name, "left", "one of a mixture of experts")
        kept = compare(module, plan) if isinstance(plan, Plan) else plan
        if isinstance(plan, Plan) and isinstance(kept, tuple):
            return plan, Block(path, name, "swapped", "", describe(plan), *kept)
        reason = reason or str(kept)
    if not has_block_shape(module):
        return None
    return None, Block(path, name, "left", reason or NOT_FOUND)
