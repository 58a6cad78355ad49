"""Run a module's own code with functions in place of its products, and record what it reads."""

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn


class Caught(Exception):
    """Carries the value that reached the last product."""

    def __init__(self, value: Tensor):
        super().__init__()
        self.value = value


class StandIn:
    """Stands for a module while its own code runs, with the given functions in place of products, by path.

    Each attribute that the code reads is recorded in `seen`, also in its methods and in its children's code.
    Writing an attribute raises TypeError.
    """

    def __init__(self, module: nn.Module, products: dict[str, Any], seen: dict[str, Any], path: str = ""):
        self.__dict__["_stand_in"] = (module, products, seen, path)

    @property
    def __class__(self):
        return type(self.__dict__["_stand_in"][0])

    def __getattr__(self, name: str):
        module, products, seen, path = self.__dict__["_stand_in"]
        if name in products:
            return products[name]
        below = {k[len(name) + 1 :]: v for k, v in products.items() if k.startswith(name + ".")}
        value: Any = getattr(module, name)
        if isinstance(value, MethodType) and value.__self__ is module:
            return MethodType(value.__func__, self)
        if not below:
            seen[path + name] = value
        if below or (isinstance(value, nn.Module) and not is_leaf(value)):
            return StandIn(value, below, seen, f"{path}{name}.")  # type: ignore[arg-type]
        return value

    def __setattr__(self, name: str, value):
        raise TypeError(f"it writes {name}")

    def __iter__(self):
        return iter([getattr(self, name) for name in self.__dict__["_stand_in"][0]._modules])

    def __call__(self, *args, **kwargs):
        kind = self.__class__
        if kind.__call__ is not nn.Module.__call__:
            raise TypeError(f"{kind.__name__} defines its own __call__")
        return kind.forward(self, *args, **kwargs)


def is_leaf(module: nn.Module) -> bool:
    """Return whether it is a torch.nn module without children: its attributes say all that it does."""
    return type(module).__module__.startswith("torch.nn.") and not module._modules


class ProductStandIn:
    """Stands for a product: calls `function`; other attributes, but the weight's dtype, are the product's."""

    def __init__(self, linear: nn.Module, function: Callable[[Tensor], Tensor], dtype: torch.dtype):
        self._linear, self._function = linear, function
        self.weight = torch.empty(linear.weight.shape, dtype=dtype, device="meta")  # type: ignore[arg-type]

    def __getattr__(self, name: str):
        return getattr(self._linear, name)

    def __call__(self, x: Tensor, *_):
        return self._function(x)


def run(module: nn.Module, chain: Callable, x: Tensor, products: dict[str, Callable], last: str, seen=None):
    """Run chain(module, x) with functions in place of `products`; return the input of the last product."""

    def catch(h: Tensor):
        raise Caught(h)

    functions = products | {last: catch}
    given = {path: ProductStandIn(module.get_submodule(path), f, x.dtype) for path, f in functions.items()}
    try:
        chain(StandIn(module, given, {} if seen is None else seen), x)
    except Caught as caught:
        return caught.value
    raise ValueError("the last product was not reached")
