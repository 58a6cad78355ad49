"""Reroute the feed-forward lines of a module through the op, by giving the module a subclass of its class.

The module keeps its children, and the subclass keeps the name and the base classes. One method calls the op
instead of the lines of the chain. When a part was changed (an adapter, a hook, a quantized weight, another
activation), the old method runs.
"""

from dataclasses import dataclass
from functools import cache, update_wrapper
from types import FunctionType
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook as has_global_hooks

from ffn.interop.swap import source
from ffn.interop.swap.plain_modules import is_plain_input, plain_projection, split_packed
from ffn.interop.swap.probe import Inner
from ffn.interop.swap.source import Chain
from ffn.interop.swap.standin import run
from ffn.nn.plain import is_hooked
from ffn.ops.feed_forward import feed_forward

PLAN = "_ffn_plan"
Pair = tuple[Any, Any]


@dataclass(frozen=True)
class Plan:
    """The rerouting of one module: the place of its chain, the function it computes, the options of the op.

    first, last: paths of the products. save, chunk_tokens, backend: options of `ffn.feed_forward`.
    """

    chain: Chain
    first: tuple[str, ...]
    last: str
    inner: Inner
    save: str = "preact"
    chunk_tokens: int | None = None
    backend: str = "auto"

    @property
    def watched(self) -> tuple[tuple[str, str, Any], ...]:
        """The (path of a module, attribute, value) that must stay for the plan to hold."""
        return (*(("", *fact) for fact in self.chain.facts), *self.inner.watched)

    def arrange(self, pairs: list) -> tuple[Pair, Pair]:
        """Return (up, gate), each (weight, bias), from the (weight, bias) of the first products."""
        inner = self.inner
        if inner.packing is not None:
            weight, bias = pairs[0]
            gate, up = split_packed(weight, inner.packing)
            gate_bias, up_bias = (None, None) if bias is None else split_packed(bias, inner.packing)
            return (up, up_bias), (gate, gate_bias)
        if inner.gate is None:
            return pairs[0], (None, None)
        return pairs[1 - inner.gate], pairs[inner.gate]


class Rerouted:
    """Base class of rerouted modules, in front of their old class."""

    def __reduce_ex__(self, protocol):
        made = super().__reduce_ex__(max(protocol, 2))  # copyreg.__newobj__, (class, ...), state
        _, (_, *rest), *state = made
        return (_revive, (*type(self)._ffn_origin, *rest), *state)  # type: ignore[attr-defined]

    def _ffn_reroute(self: Any, x: Tensor) -> Tensor:
        plan: Plan = vars(self)[PLAN]
        if is_plain_input(x):
            return apply(self, plan, x)
        chain = source.inner(origin(self), plan.chain)  # x became a tensor subclass inside the method
        return _at(self, plan.last)(run(self, chain, x, {}, plan.last))

    def _ffn_tail(self: Any, holder: nn.Module, y: Tensor, *rest):
        return tail_of(self, vars(self)[PLAN])(holder, y, *rest)  # type: ignore[misc]

    def __setstate__(self: Any, state: dict) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        plan = vars(self)[PLAN]
        if plan.chain.holds:
            source.tail(*_holder(self, plan))


def reroute(module: nn.Module, plan: Plan) -> None:
    """Give the module the subclass that follows `plan`; `restore` undoes it."""
    module.__class__ = _subclass(type(module), plan.chain)
    module.__dict__[PLAN] = plan


def restore(module: nn.Module) -> None:
    """Give the module its old class back; raise RuntimeError as `origin` does."""
    module.__class__ = origin(module)
    del module.__dict__[PLAN]


def origin(module: nn.Module) -> type:
    """Return the old class of a rerouted module.

    Raises:
        RuntimeError: something else changed its class after the swap (FSDP2 does).
    """
    found = vars(type(module)).get("_ffn_origin")
    if found is None:
        name = type(module).__name__
        raise RuntimeError(f"the class of {name} was changed after ffn.swap (sharded?): unswap before that")
    return found[0]


def reason_not_plain(module: nn.Module, paths: tuple[str, ...]) -> str | None:
    """Return the reason if one of the products at `paths` is not plain, or None."""
    for path in paths:
        product = _at(module, path)
        if plain_projection(product) is None:
            kind = type(product).__name__
            return f"{path} (a {kind}) is replaced, hooked, or its weight is no plain parameter"
    return None


def reason_not_to(module: nn.Module, plan: Plan) -> str | None:
    """Return the reason why the old method must run now, or None."""
    if plan.chain.sequence and tuple(module._modules) != plan.chain.sequence:
        return "steps were added or taken away"
    if reason := reason_not_plain(module, (*plan.first, plan.last)):
        return reason
    if plan.chain.holds and tail_of(module, plan) is None:
        return f"the forward of {plan.chain.last} was replaced"
    for path, kind in plan.inner.passed:
        passed = _at(module, path)
        if type(passed) is not kind or is_hooked(passed) or "forward" in vars(passed):
            return f"{path} was replaced or hooked"
    for path, name, value in plan.watched:
        now = getattr(_at(module, path), name)
        if now is not value and now != value:
            return f"{path or type(module).__name__}.{name} was {value!r} and is {now!r}"
    if current_rate(module, plan) >= 1.0:
        return "its dropout rate is 1"
    return None


def apply(module: nn.Module, plan: Plan, x: Tensor) -> Tensor:
    """Run the op on the module's weights, without asking `reason_not_to`."""
    (up, up_bias), (gate, gate_bias) = plan.arrange([plain_projection(_at(module, p)) for p in plan.first])
    down, down_bias = plain_projection(_at(module, plan.last))  # type: ignore[misc]
    return feed_forward(
        x, up, down, gate, up_bias, down_bias, gate_bias, activation=plan.inner.activation,
        dropout=current_rate(module, plan), save=plan.save, chunk_tokens=plan.chunk_tokens,
        backend=plan.backend,
    )  # fmt: skip


def current_rate(module: nn.Module, plan: Plan) -> float:
    """Return the rate of the dropout between the products in its present mode."""
    place = plan.inner.dropout
    return rate(module, place) if place is not None and _at(module, place[0]).training else 0.0


def rate(module: nn.Module, place: tuple[str, str] | None) -> float:
    """Return the rate of the dropout at (path, attribute) in training mode; 0.0 for None."""
    return 0.0 if place is None else float(getattr(_at(module, place[0]), place[1]))


def tail_of(module: nn.Module, plan: Plan) -> FunctionType | None:
    return source.TAILS.get(_holder(module, plan))


def _holder(module: nn.Module, plan: Plan) -> tuple[FunctionType, str]:
    """Return the forward of the module that holds the last product, and the product's name in it."""
    return type(_at(module, plan.chain.last)).forward, plan.last.rpartition(".")[2]


def _at(module: nn.Module, path: str) -> Any:
    found: nn.Module | None = module
    for name in path.split(".") if path else ():
        found = found._modules.get(name) if found is not None else None
    return found


def _revive(original: type, chain: Chain, *rest):
    """Return an empty module of the rerouted class, which pickle and deepcopy fill."""
    cls = _subclass(original, chain)
    return cls.__new__(cls, *rest)


def reason_not_to_subclass(cls: type) -> str | None:
    """Return the reason why modules of this class cannot be given a subclass, or None."""
    own = cls.__reduce_ex__ is not object.__reduce_ex__ or cls.__reduce__ is not object.__reduce__
    if own or hasattr(cls, "__getnewargs_ex__"):
        return f"{cls.__name__} defines its own way to be copied and pickled"
    return None


@cache
def _subclass(original: type, chain: Chain) -> type:
    """Return the class of rerouted modules, with the name of the old class: other code may look for it."""
    rewritten, name = source.rewrite(original, chain), chain.method

    def method(self, *args, **kwargs):
        plan, now = vars(self).get(PLAN), getattr(original, name)
        # an instance made by calling this class has no plan
        if plan is not None and now is old and not has_global_hooks():
            tensors = (x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
            if all(map(is_plain_input, tensors)) and reason_not_to(self, plan) is None:
                return rewritten(self, *args, **kwargs)
        return now(self, *args, **kwargs)

    old = getattr(original, name)
    content: dict[str, Any] = {
        name: update_wrapper(method, old),
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "_ffn_origin": (original, chain),
    }
    if issubclass(original, nn.TransformerEncoderLayer):
        content |= _slow(original)
    return type(original.__name__, (Rerouted, original), content)


def _slow(original: type) -> dict[str, Any]:
    """Return the attributes that keep torch's encoder layer off its fast path in eval mode.

    The fast path reads the weights itself and never calls the method. Nested tensors have no other path.
    """

    def forward(self, src, *args, **kwargs):
        if not src.is_nested:
            return original.forward(self, src, *args, **kwargs)
        vars(self)["_ffn_nested"] = True
        try:
            return original.forward(self, src, *args, **kwargs)
        finally:
            del vars(self)["_ffn_nested"]

    def activation_relu_or_gelu(self) -> int:  # 0 turns the fast path off
        return vars(self)["activation_relu_or_gelu"] if "_ffn_nested" in vars(self) else 0

    return {
        "forward": update_wrapper(forward, original.forward),
        "activation_relu_or_gelu": property(activation_relu_or_gelu),
    }
