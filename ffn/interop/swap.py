"""Give the feed-forward blocks of any model the lean op, in place, and take it back.

A block is found by structure: products of fitting shapes, one after the other in the code of one module.
What lies between them is identified by probing (see `ffn.interop.probe`), and before the module is rerouted
its output and input gradient are compared with the old ones. What differs, or is not understood, stays.
"""

import re

import torch
from torch import Tensor, nn

from ffn.interop import source
from ffn.interop.probe import identify, sizes
from ffn.interop.proof import compare, prove
from ffn.interop.report import Block, Report, describe
from ffn.interop.reroute import Plan, Rerouted, origin, reason_not_to, reroute, restore
from ffn.interop.source import Chain

NESTED = "_ffn_use_nested_tensor"
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
    hook or a quantized weight put on a block later takes effect: there the old code runs.

    Args:
        save, chunk_tokens, backend: as for `ffn.feed_forward`.
        dry_run: only report.

    Returns:
        For each block what was done, or why not, and the bytes of activations a token keeps for backward
        before and after. `print(report)` shows a table.

    >>> layer = nn.TransformerEncoderLayer(8, 2, 32)
    >>> [block.action for block in swap(layer)]
    ['swapped']
    """
    blocks = []
    for path, module in list(model.named_modules()):
        found = _examine(path, module, save, chunk_tokens, backend)
        if found is None:
            continue
        plan, block = found
        blocks.append(block)
        if plan is not None and not dry_run:
            reroute(module, plan)
    if not dry_run:
        _set_nested(model)
    return Report(blocks)


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
    _set_nested(model)
    return len(rerouted)


def _set_nested(model: nn.Module) -> None:
    """Keep torch's encoder from making nested tensors, which only its layers' own fast path can read."""
    for module in model.modules():
        if not isinstance(module, nn.TransformerEncoder):
            continue
        if any(isinstance(layer, Rerouted) for layer in module.layers):
            vars(module).setdefault(NESTED, module.use_nested_tensor)
            module.use_nested_tensor = False
        elif NESTED in vars(module):
            module.use_nested_tensor = vars(module).pop(NESTED)


def _examine(path, module, save, chunk_tokens, backend) -> tuple[Plan | None, Block] | None:
    """The plan for a module and its line in the report; None if no block is to be seen in it."""
    name = type(module).__name__
    if type(module).__module__.startswith("ffn.") or "Attention" in name:
        return None
    if isinstance(module, Rerouted):
        return None, Block(path, name, "left", "swapped before")
    if any(p.ndim == 3 and EXPERTS.search(key) for key, p in module.named_parameters(recurse=False)):
        return None, Block(path, name, "left", "a mixture of experts")
    products = {child: found for child, m in module.named_children() if 0 < len(found := _products(child, m)) < 3}
    ends = {child: end for child, m in module.named_children() if (end := _opening(child, m))}
    reason = None
    for chain in source.find_chains(module, set(products), set(ends)):
        first = tuple(path for name in chain.first for path in products.get(name, ()))
        last = ends[chain.last] if chain.holds else products[chain.last][0]
        if len(first) > 2 or not set(chain.first) <= set(products) or not _fits(module, first, last):
            continue
        if "experts" in path.split("."):
            return None, Block(path, name, "left", "one of a mixture of experts")
        plan = _plan(module, chain, first, last, save, chunk_tokens, backend)
        if isinstance(plan, Plan):
            kept = compare(module, plan)
            if isinstance(kept, tuple):
                return plan, Block(path, name, "swapped", "", describe(plan), *kept)
            plan = kept
        reason = reason or plan
    if not _has_block_shape(module, products):
        return None
    if reason is None:
        reason = "its source is not to be had, or holds no such products one after the other"
    return None, Block(path, name, "left", reason)


def _products(path: str, module: nn.Module) -> list[str]:
    """Paths of the Linears (and their like) in a child: all, or the first three."""
    if _is_product(module):
        return [path]
    found: list[str] = []
    for name, child in module.named_children():
        found += _products(f"{path}.{name}", child)
        if len(found) > 2:
            break
    return found


def _opening(path: str, module: nn.Module) -> str | None:
    """The path of the product that the forward of a child begins with, where that holds one."""
    for name, child in module.named_children():
        if _is_product(child) and source.tail(type(module), name) is not None:
            return f"{path}.{name}"
    return None


def _is_product(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 2 and (
        hasattr(module, "in_features") or type(module).__name__ == "Conv1D"
    )


def _fits(module: nn.Module, first: tuple[str, ...], last: str) -> bool:
    """Whether the shapes are those of a block: D -> H (twice, or 2H when packed), H -> O."""
    into = [sizes(module.get_submodule(path)) for path in first]
    H = sizes(module.get_submodule(last))[0]
    if len({D for D, _ in into}) != 1:
        return False
    return all(out == H for _, out in into) or (len(into) == 1 and into[0][1] == 2 * H)


def _has_block_shape(module: nn.Module, products: dict[str, list[str]]) -> bool:
    if any(True for _ in module.parameters(recurse=False)):  # a mixer of another kind
        return False
    pairs = [sizes(module.get_submodule(found[0])) for found in products.values() if len(found) == 1]
    return any(D == O and (width == 2 * H or width == H > D) for D, width in pairs for H, O in pairs)


def _plan(module, chain: Chain, first, last, save, chunk_tokens, backend) -> Plan | str:
    """The plan, proved in float64 on thin products of the same hidden width, or why there is none."""
    inner = identify(module, source.inner(type(module), chain), first, last)
    if isinstance(inner, str):
        return inner
    plan = Plan(chain, first, last, inner, save, chunk_tokens, backend)
    return reason_not_to(module, plan) or prove(module, plan) or plan
