"""Identify what a module computes between its products, by running its own code on chosen values.

The code between the products runs in float64 with stand-ins: the first product returns values chosen here,
the last product catches its input. The numbers show the activation, the half of a packed product that is the
gate, a dropout, a clamp or a multiplier, however the code is written.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from ffn import activations
from ffn.interop.swap.plain_modules import PACKINGS, split_packed
from ffn.interop.swap.standin import is_leaf, run

Found = tuple[str, int | None, str | None]  # the first three of `Inner`
_EVERY_MODULES = vars(nn.Module()).keys()  # attributes that do not decide what a module computes


@dataclass(frozen=True)
class Inner:
    """The code between the products: h = dropout(act(pre)), or dropout(act(gate) * up).

    activation: the name in the table of activations. gate: index in the chain of the product that is the gate
    (None when plain). packing: where the gate lies in a single packed product, or None.
    dropout: (path of a module, attribute that holds the rate), or None.
    watched: (path of a module, attribute, value) that the code reads: while they stay, the others hold.
    passed: (path, class) of the modules that the code calls, and of the modules that hold the products.
    """

    activation: str
    gate: int | None
    packing: str | None
    dropout: tuple[str, str] | None
    watched: tuple[tuple[str, str, Any], ...]
    passed: tuple[tuple[str, type], ...]


@contextmanager
def mode(module: nn.Module, training: bool) -> Iterator[None]:
    """Put a module and its children in training or eval mode; restore modes and random state afterwards.

    Sets the flags directly: a train() of their own may do more than can be undone.
    """
    was = {child: child.training for child in module.modules()}
    devices = {p.get_device() for p in module.parameters() if p.is_cuda}
    try:
        with torch.random.fork_rng(devices=sorted(devices)), torch.enable_grad():
            for child in was:
                child.training = training
            yield
    finally:
        for child, before in was.items():
            child.training = before


def identify(module: nn.Module, chain: Callable, first: tuple[str, ...], last: str) -> Inner | str:
    """Identify what `chain(module, x)` computes between its products; return a reason where it cannot.

    Args:
        module: owns the code; it is unchanged afterwards.
        chain: the code, as `ffn.interop.swap.source.inner` returns it.
        first, last: paths of the products within the module.
    """
    seen: dict[str, Any] = {}
    D, H = sizes(module.get_submodule(first[0]))[0], sizes(module.get_submodule(last))[0]

    def h_of(grids: list[Tensor]) -> Tensor:
        products = {path: lambda x, grid=grid: grid.clone() for path, grid in zip(first, grids, strict=True)}
        return run(module, chain, grids[0].new_zeros(*grids[0].shape[:-1], D), products, last, seen)

    try:
        grids = preactivations([sizes(module.get_submodule(path))[1] for path in first])
        with mode(module, training=False):
            h = h_of(grids)
            found = _row(h, grids, H)
            fault = found if isinstance(found, str) else _in_short(h_of, grids, found)
        with mode(module, training=True):
            torch.default_generator.manual_seed(0)
            dropped = h_of(grids)
            dropout = None if fault else dropout_of(h, dropped, grids, seen)
    except Exception as error:  # noqa: BLE001 (other people's code may raise anything)
        return unsteady(seen) or f"its code cannot be probed ({in_short(error)})"
    if fault := fault or unsteady(seen):
        return fault
    if isinstance(dropout, str):
        return dropout
    assert not isinstance(found, str)
    watched = _watched(seen, dropout)
    holders = {path.rpartition(".")[0] for path in (*first, last)} - {""}
    seen |= {path: module.get_submodule(path) for path in holders}
    passed = tuple((path, type(value)) for path, value in seen.items() if isinstance(value, nn.Module))
    return Inner(*found, dropout, watched, passed)


def in_short(error: Exception) -> str:
    """Return the type of an error and the first line of its message, at most 80 characters of it."""
    line = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {line[:80]!r}"


def sizes(product: nn.Module) -> tuple[int, int]:
    """Return (in, out) of a product. The weight of a Linear is (out, in), of a Conv1D (in, out)."""
    if is_parametrized(product, "weight"):  # to read the weight would run the parametrization
        return product.in_features, product.out_features  # type: ignore[return-value]
    weight = product.weight
    assert isinstance(weight, Tensor)
    out, into = weight.shape
    return (into, out) if hasattr(product, "in_features") else (out, into)


def preactivations(widths: list[int]) -> list[Tensor]:
    """Return preactivations (2, n, width) for each width: values from -1e4 to 1e4 in random order."""
    reach = torch.logspace(-3, 4, 200, dtype=torch.float64)
    values = torch.cat([torch.linspace(-12, 12, 601, dtype=torch.float64), reach, -reach])
    generator = torch.Generator().manual_seed(0)
    grids = []
    for width in widths:
        tokens = 2 * -(-2048 // width)
        order = torch.randint(len(values), (2, tokens, width), generator=generator)
        grids.append(values[order].requires_grad_())
    return grids


def _row(h: Tensor, grids: list[Tensor], H: int) -> Found | str:
    """Return the (activation, gate, packing) that give h and its derivatives, or the reason for none."""
    if h.shape[:-1] != grids[0].shape[:-1] or h.shape[-1] != H or h.dtype != torch.float64:
        return f"the input of the last product has shape {tuple(h.shape)} and dtype {h.dtype}"
    weight = torch.linspace(0.5, 1.5, h.numel(), dtype=torch.float64).view_as(h)
    depends = h.requires_grad
    slopes = torch.autograd.grad(h, grids, weight, retain_graph=True, allow_unused=True) if depends else ()
    if not depends or any(slope is None for slope in slopes):
        return "the last product does not depend on the first"
    plain = len(grids) == 1 and grids[0].shape[-1] == H
    orders: list[tuple[int | None, str | None]]
    if plain:
        orders = [(None, None)]
    elif len(grids) == 2:
        orders = [(0, None), (1, None)]
    else:
        orders = [(0, packing) for packing in PACKINGS]
    pre = [grid.detach().requires_grad_() for grid in grids]
    for gate, packing in orders:
        for row in activations.TABLE.values():
            if row.gated == plain:
                continue
            value = _value((row.name, gate, packing), pre)
            if _close(value, h) and all(map(_close, torch.autograd.grad(value, pre, weight), slopes)):
                return row.name, gate, packing
    return "no activation of the table gives its values (an unknown one, a clamp, a multiplier, a norm?)"


def _factors(found: Found, pre: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the input of the activation, and the factor of its value (1 when plain)."""
    _, gate, packing = found
    if packing is not None:
        gates, ups = (half.movedim(0, -1) for half in split_packed(pre[0].movedim(-1, 0), packing))
        return gates, ups
    return (pre[0], torch.ones_like(pre[0])) if gate is None else (pre[gate], pre[1 - gate])


def _value(found: Found, pre: list[Tensor]) -> Tensor:
    formula = activations.TABLE[found[0]].formula
    assert formula is not None
    a, b = _factors(found, pre)
    return formula(a)[0] * b


def _close(a: Tensor, b: Tensor) -> bool:
    return bool(((a - b).abs() <= 1e-9 * (1.0 + b.abs())).all())


def _in_short(h_of: Callable[[list[Tensor]], Tensor], grids: list[Tensor], found: Found) -> str | None:
    """Check shorter dtypes up to their largest values, NaN, and a single token; return a reason, or None."""
    cases = ((torch.float64, 1), (torch.float32, None), (torch.bfloat16, None), (torch.float16, None))
    for dtype, tokens in cases:
        top, eps = torch.finfo(dtype).max, max(torch.finfo(dtype).eps, 1e-10)
        pre = [grid.detach()[:, :tokens].clone() for grid in grids]
        plain = len(pre) == 1 and found[2] is None
        if plain and tokens is None:  # the product of two such values would overflow
            end = top if dtype == torch.float16 else 0.4 * top
            pre[0].view(-1)[::17], pre[0].view(-1)[1::17] = end, -end
        pre[0].view(-1)[-1] = torch.nan
        pre = [values.to(dtype) for values in pre]
        try:
            h = h_of(pre)
        except NotImplementedError:  # torch lacks some functions in some dtypes
            continue
        wide = [values.double() for values in pre]
        a, b = _factors(found, wide)
        value = _value(found, wide)
        room = 16 * eps * (1.0 + a.abs().clamp(max=12.0)) * b.abs().clamp(min=1.0) + 4 * eps * value.abs()
        sure = (value.abs() <= (1.0 if plain else 0.9) * top) | (value.abs() > 1.1 * top)
        near = ((h - value).abs() <= room) | (h == value.to(dtype))
        right = torch.where(value.isnan(), h.isnan(), near | ~sure)
        if h.dtype != dtype or not bool(right.all()):
            return f"in {str(dtype)[6:]}{', for one token,' if tokens else ''} it computes other values"
    return None


def unsteady(seen: dict[str, Any]) -> str | None:
    """Return the reason if the code reads what may change unseen: a tensor, or an object with state."""
    for path, value in seen.items():
        if isinstance(value, nn.Module):
            if is_leaf(value):
                tensors = [
                    *value._parameters,
                    *value._buffers,
                    *(k for k, v in vars(value).items() if isinstance(v, Tensor)),
                ]
                if tensors:
                    return f"{path}.{tensors[0]} takes part between the products"
        elif not (_is_scalar(value) or _is_function(value)):
            return f"{path} takes part between the products"
    return None


def dropout_of(h: Tensor, dropped: Tensor, grids: list[Tensor], seen: dict[str, Any]):
    """Return (path, attribute) of the rate of the dropout from h to `dropped`, or None if none dropped.

    Return a str with the reason if it is not a plain dropout, or if the place of its rate is not clear.
    """
    other = "in training mode it does more to values or gradients than dropout"
    live = h != 0
    factor = torch.where(live, dropped / h, 0.0).detach()
    scale, lost = factor[factor != 0], (live & (factor == 0)).double()
    if scale.numel() == 0:
        return "its dropout rate is 1"
    if not dropped.requires_grad:
        return other
    p = float(1.0 - 1.0 / scale.mean())
    if float((scale - scale.mean()).abs().max()) > 1e-9 * float(scale.mean().abs()):
        return other
    slopes = zip(
        *(torch.autograd.grad(y, grids, w) for y, w in ((h, factor), (dropped, live.double()))), strict=True
    )
    if abs(float(lost.sum() / live.sum()) - p) > 0.1 or not all(_close(a, b) for a, b in slopes):
        return other
    for dim in range(lost.ndim):  # neighbours must be dropped independently
        first, last = (live.narrow(dim, start, live.shape[dim] - 1) for start in (0, 1))
        pairs = int((first & last).sum())
        both = float(
            (lost.narrow(dim, 0, live.shape[dim] - 1) * lost.narrow(dim, 1, live.shape[dim] - 1)).sum()
        )
        if abs(both - p * p * pairs) > 6 * (p * p * pairs) ** 0.5 + 3:
            return other
    modules = [path for path, value in seen.items() if type(value) is nn.Dropout]
    if len(modules) == 1 and abs(seen[modules[0]].p - p) < 1e-9:
        return modules[0], "p"
    if p < 1e-9:
        return None
    scalars = [path for path, value in seen.items() if type(value) is float and abs(value - p) < 1e-9]
    if len(scalars) == 1:
        holder, _, name = scalars[0].rpartition(".")
        return holder, name
    return f"it drops {p:.3g} of its values, but no single attribute holds that rate"


def _watched(seen: dict[str, Any], dropout: tuple[str, str] | None) -> tuple[tuple[str, str, Any], ...]:
    found: list[tuple[str, str, Any]] = []
    for path, value in seen.items():
        holder, _, name = path.rpartition(".")
        if not isinstance(value, nn.Module):
            found.append((holder, name, value))
        elif is_leaf(value):
            own = vars(value).keys() - _EVERY_MODULES
            found += [(path, key, v) for key, v in vars(value).items() if key in own and _is_scalar(v)]
    return tuple(f for f in found if f[:2] != dropout and f[1] != "training")


def _is_scalar(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str | torch.dtype | torch.device)


def _is_function(value: Any) -> bool:
    """Return whether it is a function without state."""
    return (
        callable(value)
        and not isinstance(value, MethodType)
        and (isinstance(value, FunctionType | type | partial) or not getattr(value, "__dict__", None))
    )
