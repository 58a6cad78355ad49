"""What a module computes between its products, found by watching its own code run on chosen values.

The code between the first product and the last is run in float64 with stand-ins for the products: the first
returns values chosen here, the last catches what reaches it. So the activation, which half of a packed
product is the gate, a dropout, a clamp or a multiplier all show in the numbers, whatever the code looks like.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ffn import activations
from ffn.interop.weights import PACKINGS, split_packed


@dataclass(frozen=True)
class Inner:
    """h = dropout(act(pre)), or dropout(act(gate) * up).

    activation: a row of the table. gate: which of the products it is applied to, by its index in the chain
    (None when plain). packing: how the halves of a single packed product lie, or None.
    dropout: (path of a module, the attribute that holds the probability), or None.
    watched: (path of a module, attribute, value) read on the way: while they stay, so does all of this.
    passed: (path, class) of the modules called on the way, and of those that hold the products.
    """

    activation: str
    gate: int | None
    packing: str | None
    dropout: tuple[str, str] | None
    watched: tuple[tuple[str, str, Any], ...]
    passed: tuple[tuple[str, type], ...]


class Caught(Exception):
    """Carries what reached the last product."""

    def __init__(self, value: Tensor):
        super().__init__()
        self.value = value


class StandIn:
    """A module to its own code, but for the products: those are functions given here, by path."""

    def __init__(self, module: nn.Module, products: dict[str, Any], seen: dict[str, Any], path: str = ""):
        self._stand_in = (module, products, seen, path)

    def __getattr__(self, name: str):
        module, products, seen, path = self.__dict__["_stand_in"]
        if name in products:
            return products[name]
        below = {k[len(name) + 1 :]: v for k, v in products.items() if k.startswith(name + ".")}
        value = getattr(module, name)
        if below:
            return StandIn(value, below, seen, f"{path}{name}.")
        seen[path + name] = value
        return value

    def __iter__(self):
        return iter([getattr(self, name) for name, _ in self.__dict__["_stand_in"][0].named_children()])

    def __call__(self, *args, **kwargs):
        return type(self.__dict__["_stand_in"][0]).forward(self, *args, **kwargs)  # type: ignore[arg-type]


class Product:
    """Stands for a Linear: calls `function`; all else is the Linear's, but for the dtype of its weight."""

    def __init__(self, linear: nn.Module, function: Callable[[Tensor], Tensor], dtype: torch.dtype):
        self._linear, self._function = linear, function
        self.weight = torch.empty(linear.weight.shape, dtype=dtype, device="meta")  # type: ignore[arg-type]

    def __getattr__(self, name: str):
        return getattr(self._linear, name)

    def __call__(self, x: Tensor, *_):
        return self._function(x)


def run(module: nn.Module, chain: Callable, x: Tensor, products: dict[str, Callable], last: str, seen=None):
    """What reaches the last product when chain(module, x) runs with functions in place of `products`."""

    def catch(h: Tensor):
        raise Caught(h)

    functions = products | {last: catch}
    given = {path: Product(module.get_submodule(path), f, x.dtype) for path, f in functions.items()}
    try:
        chain(StandIn(module, given, {} if seen is None else seen), x)
    except Caught as caught:
        return caught.value
    raise ValueError("the last product was not reached")


@contextmanager
def mode(module: nn.Module, training: bool) -> Iterator[None]:
    """The module and all in it in training or eval mode; then as they were, and the random state too."""
    was = {child: child.training for child in module.modules()}
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            module.train(training)
            yield
    finally:
        for child, before in was.items():
            child.training = before


def identify(module: nn.Module, chain: Callable, first: tuple[str, ...], last: str) -> Inner | str:
    """What `chain(module, x)` computes between its products, or why that is not a row of the table.

    Args:
        module: owns the code; it is left as it was.
        chain: the code as `ffn.interop.source.inner` gives it.
        first, last: paths of the products within the module.
    """
    seen: dict[str, Any] = {}
    D, H = sizes(module.get_submodule(first[0]))[0], sizes(module.get_submodule(last))[0]
    grids = _grids([sizes(module.get_submodule(path))[1] for path in first])
    products = {path: lambda x, value=value: value for path, value in zip(first, grids, strict=True)}
    x = torch.zeros(*grids[0].shape[:2], D, dtype=torch.float64)
    try:
        with mode(module, training=False):
            h = run(module, chain, x, products, last, seen)
            found = _row(h, grids, H)
        with mode(module, training=True):
            dropped = run(module, chain, x, products, last)
    except Exception as error:  # noqa: BLE001 (it is their code that ran, and may raise anything)
        return _unsteady(seen) or f"its code cannot be probed ({type(error).__name__}: {str(error)[:80]!r})"
    if isinstance(found, str) or (fault := _unsteady(seen)):
        return found if isinstance(found, str) else fault
    dropout = _dropout(h.detach(), dropped.detach(), seen)
    if isinstance(dropout, str):
        return dropout
    watched = _watched(seen, dropout)
    holders = {path.rpartition(".")[0] for path in (*first, last)} - {""}
    seen |= {path: module.get_submodule(path) for path in holders}
    passed = tuple((path, type(value)) for path, value in seen.items() if isinstance(value, nn.Module))
    return Inner(*found, dropout, watched, passed)


def sizes(product: nn.Module) -> tuple[int, int]:
    """(in, out) of a Linear, or of a Conv1D, which has its weight the other way round."""
    weight = product.weight
    assert isinstance(weight, Tensor)
    out, into = weight.shape
    return (into, out) if hasattr(product, "in_features") else (out, into)


def _grids(widths: list[int]) -> list[Tensor]:
    """Preactivations (2, n, width) each: everything from -1e4 to 1e4, in another order at each place."""
    reach = torch.logspace(-3, 4, 200, dtype=torch.float64)
    values = torch.cat([torch.linspace(-12, 12, 601, dtype=torch.float64), reach, -reach])
    generator = torch.Generator().manual_seed(0)
    grids = []
    for width in widths:
        tokens = 2 * -(-2048 // width)
        order = torch.randint(len(values), (2, tokens, width), generator=generator)
        grids.append(values[order].requires_grad_())
    return grids


def _row(h: Tensor, grids: list[Tensor], H: int) -> tuple[str, int | None, str | None] | str:
    """(activation, gate, packing) that give h and its derivatives, or why none does."""
    if h.shape[:-1] != grids[0].shape[:-1] or h.shape[-1] != H or h.dtype != torch.float64:
        return f"what reaches the last product has shape {tuple(h.shape)} and dtype {str(h.dtype)[6:]}"
    weight = torch.linspace(0.5, 1.5, h.numel(), dtype=torch.float64).view_as(h)
    slopes = torch.autograd.grad(h, grids, weight, allow_unused=True)
    if any(slope is None for slope in slopes):
        return "the last product does not depend on the first"
    plain = len(grids) == 1 and grids[0].shape[-1] == H
    orders: list[tuple[int | None, str | None]]
    if plain:
        orders = [(None, None)]
    elif len(grids) == 2:
        orders = [(0, None), (1, None)]
    else:
        orders = [(0, packing) for packing in PACKINGS]
    for gate, packing in orders:
        pre = [grid.detach().requires_grad_() for grid in grids]
        for name, row in activations.TABLE.items():
            assert row.formula is not None
            if row.gated == plain:
                continue
            if plain:
                value = row.formula(pre[0])[0]
            else:
                if packing is None:
                    a, b = pre[gate], pre[1 - gate]  # type: ignore[index,operator]
                else:
                    a, b = (half.movedim(0, -1) for half in split_packed(pre[0].movedim(-1, 0), packing))
                value = row.formula(a)[0] * b
            if _close(value, h) and all(
                _close(ours, theirs)
                for ours, theirs in zip(torch.autograd.grad(value, pre, weight), slopes, strict=True)
            ):
                return name, gate, packing
    return "no activation of the table gives its values (an unknown one, a clamp, a multiplier, a norm?)"


def _close(a: Tensor, b: Tensor) -> bool:
    return bool(((a - b).abs() <= 1e-9 * (1.0 + b.abs())).all())


def _unsteady(seen: dict[str, Any]) -> str | None:
    """Why what was found may not last: tensors read on the way, which training changes."""
    for path, value in seen.items():
        if isinstance(value, Tensor):
            return f"{path} takes part between the products"
        if isinstance(value, nn.Module):
            for name, _ in (*value.named_parameters(), *value.named_buffers()):
                return f"{path}.{name} takes part between the products"
    return None


def _dropout(h: Tensor, dropped: Tensor, seen: dict[str, Any]) -> tuple[str, str] | str | None:
    """Where the probability is kept with which values of h were dropped; a str says why it is not known."""
    kept = dropped != 0
    scale = (dropped / h)[kept & (h != 0)]
    if scale.numel() == 0:
        return "everything is dropped"
    p = float(1.0 - 1.0 / scale.mean())
    share = float((dropped[h != 0] == 0).double().mean())
    if float((scale - scale.mean()).abs().max()) > 1e-9 * float(scale.mean().abs()) or abs(share - p) > 0.1:
        return "in training its values are other than kept and scaled, or dropped"
    modules = [path for path, value in seen.items() if type(value) is nn.Dropout]
    if len(modules) == 1 and abs(seen[modules[0]].p - p) < 1e-9:
        return modules[0], "p"
    if p < 1e-9:
        return None
    scalars = [path for path, value in seen.items() if type(value) is float and abs(value - p) < 1e-9]
    if len(scalars) == 1:
        holder, _, name = scalars[0].rpartition(".")
        return holder, name
    return f"it drops {p:.3g} of its values, and where that is kept is not clear"


def _watched(seen: dict[str, Any], dropout: tuple[str, str] | None) -> tuple[tuple[str, str, Any], ...]:
    found: list[tuple[str, str, Any]] = []
    for path, value in seen.items():
        holder, _, name = path.rpartition(".")
        if isinstance(value, nn.Module):
            found += [(path, key, v) for key, v in vars(value).items() if _is_scalar(v) and key[0] != "_"]
        elif _is_scalar(value) or (callable(value) and getattr(value, "__self__", None) is None):
            found.append((holder, name, value))
    return tuple(f for f in found if f[:2] != dropout and f[1] != "training")


def _is_scalar(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)
