"""Find the feed-forward blocks of a module by structure: products of fitting shapes, one after the other."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from ffn.interop.swap import source
from ffn.interop.swap.probe import identify, sizes
from ffn.interop.swap.proof import prove
from ffn.interop.swap.reroute import Plan, reason_not_plain, reason_not_to, reason_not_to_subclass
from ffn.interop.swap.source import Chain

NOT_FOUND = "its source is not available, or does not call the Linears of a block one after the other"
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def plans(
    module: nn.Module, save: str = "preact", chunk_tokens: int | None = None, backend: str = "auto"
) -> Iterator[Plan | str]:
    """Yield for each chain in the module's own code a plan proved in float64, or the reason for none.

    The values of the weights are not read.
    """
    if isinstance(module, torch.jit.ScriptModule):
        return
    products = _products_by_child(module)
    ends = {child: end for child, m in module.named_children() if (end := _opening(child, m))}
    for chain in source.find_chains(module, set(products), set(ends)):
        first = tuple(path for name in chain.first for path in products.get(name, ()))
        last = ends[chain.last] if chain.holds else products[chain.last][0]
        if 0 < len(first) <= 2 and set(chain.first) <= set(products) and _fits(module, first, last):
            if chain.holds or last == chain.last:
                yield _plan(module, chain, first, last, save, chunk_tokens, backend)
            else:  # the code after the product in that forward would be lost
                yield f"the forward of {chain.last} does not begin with its product"


def reason_not_found(module: nn.Module) -> str:
    """Return the reason why `plans` yields nothing for the module."""
    if isinstance(module, torch.jit.ScriptModule):
        return NOT_FOUND
    tree = source.tree_of(source.written(type(module), "forward"))
    if tree is not None and [a.arg for a in (*tree.args.posonlyargs, *tree.args.args)][:1] != ["self"]:
        return "the first argument of its forward must be named self"
    if len(_products("", module)) < 2:
        return "it does not call two Linears of fitting shapes one after the other"
    return NOT_FOUND


def has_block_shape(module: nn.Module) -> bool:
    """Return whether two children hold one product each, in the shapes of a block."""
    convolves = any("Conv" in type(child).__name__ and not _is_product(child) for child in module.children())
    mixes = convolves or any(True for _ in module.parameters(recurse=False))
    if isinstance(module, torch.jit.ScriptModule) or mixes:
        return False
    found = [paths[0] for paths in _products_by_child(module).values() if len(paths) == 1]
    pairs = [sizes(module.get_submodule(path)) for path in found]
    return any(out == D and (width == 2 * H or width == H > D) for D, width in pairs for H, out in pairs)


def _products_by_child(module: nn.Module) -> dict[str, list[str]]:
    """Map each child that is a product, or holds one or two, to their paths."""
    return {child: found for child, m in module.named_children() if 0 < len(found := _products(child, m)) < 3}


def _products(path: str, module: nn.Module) -> list[str]:
    """Return the paths of the products in a child, at most the first three."""
    if isinstance(module, torch.jit.ScriptModule):
        return []
    if _is_product(module):
        return [path]
    found: list[str] = []
    for name, child in module.named_children():
        found += _products(f"{path}.{name}", child)
        if len(found) > 2:
            break
    return found


def _opening(path: str, module: nn.Module) -> str | None:
    """Return the path of the product that the child's forward begins with, or None."""
    if isinstance(module, torch.jit.ScriptModule):
        return None
    for name, child in module.named_children():
        if _is_product(child) and source.tail(type(module).forward, name) is not None:
            return f"{path}.{name}"
    return None


def _is_product(module: nn.Module) -> bool:
    if not (hasattr(module, "in_features") or type(module).__name__ == "Conv1D"):
        return False
    if is_parametrized(module, "weight"):  # to read the weight would run the parametrization
        return hasattr(module, "out_features")
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 2


def _fits(module: nn.Module, first: tuple[str, ...], last: str) -> bool:
    """Return whether the shapes are those of a block: D -> H (twice, or once to 2H when packed), H -> O."""
    into = [sizes(module.get_submodule(path)) for path in first]
    H = sizes(module.get_submodule(last))[0]
    if len({D for D, _ in into}) != 1:
        return False
    return all(out == H for _, out in into) or (len(into) == 1 and into[0][1] == 2 * H)


def _plan(module, chain: Chain, first, last, save, chunk_tokens, backend) -> Plan | str:
    """Return the plan, proved in float64 on thin products, or the reason for none."""
    paths = (*first, last)
    reason = reason_not_to_subclass(type(module)) or reason_not_plain(module, paths)
    if reason := reason or _reason_of_weights(module, paths):
        return reason
    with torch.device("cpu"):  # whatever the default device is
        inner = identify(module, source.inner(type(module), chain), first, last)
        if isinstance(inner, str):
            return inner
        plan = Plan(chain, first, last, inner, save, chunk_tokens, backend)
        return reason_not_to(module, plan) or prove(module, plan) or plan


def _reason_of_weights(module: nn.Module, paths: tuple[str, ...]) -> str | None:
    """Return the reason if the weights are empty, of different dtypes, or of a dtype that the op lacks."""
    weights = [module.get_submodule(path).weight for path in paths]
    dtypes = {weight.dtype for weight in weights if isinstance(weight, Tensor)}
    if any(0 in weight.shape for weight in weights if isinstance(weight, Tensor)):
        return "one of its Linears has a width of 0"
    if len(dtypes) != 1:
        return f"its Linears have different dtypes: {', '.join(sorted(map(str, dtypes)))}"
    (dtype,) = dtypes
    return None if dtype in DTYPES else f"its weights are {dtype}"
