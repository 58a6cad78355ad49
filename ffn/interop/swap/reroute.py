"""A module whose feed-forward lines go through the block's op, while it stays what it was.

The module keeps its children, its name and its base classes; only its class is changed to a subclass of the
old one, in which one method calls the op in place of the lines between the products. Whenever something was
done to what takes part (an adapter, a hook, a quantized weight, another activation) the old method runs.
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
    """How one module is rerouted: where its code is, what that computes, how the op shall run.

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
        """(path of a module, attribute, value): what must stay for the plan to hold."""
        return (*(("", *fact) for fact in self.chain.facts), *self.inner.watched)

    def arrange(self, pairs: list) -> tuple[Pair, Pair]:
        """(up, gate), each (weight, bias), from those of the first products."""
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
    """What a rerouted module's class has before the class it had."""

    def __reduce_ex__(self, protocol):
        made = super().__reduce_ex__(max(protocol, 2))  # copyreg.__newobj__, (class, ...), state
        _, (_, *rest), *state = made
        return (_revive, (*type(self)._ffn_origin, *rest), *state)  # type: ignore[attr-defined]

    def _ffn_reroute(self: Any, x: Tensor) -> Tensor:
        plan: Plan = vars(self)[PLAN]
        if is_plain_input(x):
            return apply(self, plan, x)
        chain = source.inner(origin(self), plan.chain)  # made on the way, of a kind that the op does not know
        return _at(self, plan.last)(run(self, chain, x, {}, plan.last))

    def _ffn_tail(self: Any, holder: nn.Module, y: Tensor, *rest):
        return tail_of(self, vars(self)[PLAN])(holder, y, *rest)  # type: ignore[misc]

    def __setstate__(self: Any, state: dict) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        plan = vars(self)[PLAN]
        if plan.chain.holds:
            source.tail(*_holder(self, plan))


def reroute(module: nn.Module, plan: Plan) -> None:
    """Give the module the class in which `plan` holds; `restore` takes it back."""
    module.__class__ = _subclass(type(module), plan.chain)
    module.__dict__[PLAN] = plan


def restore(module: nn.Module) -> None:
    """Give the module back the class it had; RuntimeError as `origin` raises it."""
    module.__class__ = origin(module)
    del module.__dict__[PLAN]


def origin(module: nn.Module) -> type:
    """The class a rerouted module had.

    Raises:
        RuntimeError: something else has changed its class since (FSDP2 does).
    """
    found = vars(type(module)).get("_ffn_origin")
    if found is None:
        name = type(module).__name__
        raise RuntimeError(f"{name} was changed after ffn.swap (sharded?): unswap before that, or load anew")
    return found[0]


def reason_not_to(module: nn.Module, plan: Plan) -> str | None:
    """Why the old method must run now, or None."""
    if plan.chain.sequence and tuple(module._modules) != plan.chain.sequence:
        return "steps were added or taken away"
    for path in (*plan.first, plan.last):
        product = _at(module, path)
        if plain_projection(product) is None:
            kind = type(product).__name__
            return f"{path} (a {kind}) is replaced, hooked, or its weight is no plain parameter"
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
    if probability(module, plan) >= 1.0:
        return "everything is dropped"
    return None


def apply(module: nn.Module, plan: Plan, x: Tensor) -> Tensor:
    """The op on the module's weights, whether or not there is a reason not to."""
    (up, up_bias), (gate, gate_bias) = plan.arrange([plain_projection(_at(module, p)) for p in plan.first])
    down, down_bias = plain_projection(_at(module, plan.last))  # type: ignore[misc]
    return feed_forward(
        x, up, down, gate, up_bias, down_bias, gate_bias, activation=plan.inner.activation,
        dropout=probability(module, plan), save=plan.save, chunk_tokens=plan.chunk_tokens,
        backend=plan.backend,
    )  # fmt: skip


def probability(module: nn.Module, plan: Plan) -> float:
    """Of the dropout between the products, now."""
    place = plan.inner.dropout
    return rate(module, place) if place is not None and _at(module, place[0]).training else 0.0


def rate(module: nn.Module, place: tuple[str, str] | None) -> float:
    """Of the dropout at (path, attribute), whether it is training or not; 0.0 where there is none."""
    return 0.0 if place is None else float(getattr(_at(module, place[0]), place[1]))


def tail_of(module: nn.Module, plan: Plan) -> FunctionType | None:
    return source.TAILS.get(_holder(module, plan))


def _holder(module: nn.Module, plan: Plan) -> tuple[FunctionType, str]:
    """The forward of what holds the last product, and the product's name there."""
    return type(_at(module, plan.chain.last)).forward, plan.last.rpartition(".")[2]


def _at(module: nn.Module, path: str) -> Any:
    found: nn.Module | None = module
    for name in path.split(".") if path else ():
        found = found._modules.get(name) if found is not None else None
    return found


def _revive(original: type, chain: Chain, *rest):
    """An empty module of the rerouted class; pickle and deepcopy fill it."""
    cls = _subclass(original, chain)
    return cls.__new__(cls, *rest)


def reason_not_to_subclass(cls: type) -> str | None:
    """Why modules of this class cannot be given another one, or None."""
    own = cls.__reduce_ex__ is not object.__reduce_ex__ or cls.__reduce__ is not object.__reduce__
    if own or hasattr(cls, "__getnewargs_ex__"):
        return f"{cls.__name__} is copied and pickled in a way of its own"
    return None


@cache
def _subclass(original: type, chain: Chain) -> type:
    """The class of rerouted modules: by its names the old one, which code elsewhere may look for."""
    rewritten, name = source.rewrite(original, chain), chain.method

    def method(self, *args, **kwargs):
        plan, now = vars(self).get(PLAN), getattr(original, name)
        if plan is not None and now is old and not has_global_hooks():  # none in one that the class made anew
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
    """What keeps torch's encoder layer off its fast path, which in eval mode reads the weights itself, past
    the method. Nested tensors know no other path."""

    def forward(self, src, *args, **kwargs):
        if not src.is_nested:
            return original.forward(self, src, *args, **kwargs)
        vars(self)["_ffn_nested"] = True
        try:
            return original.forward(self, src, *args, **kwargs)
        finally:
            del vars(self)["_ffn_nested"]

    def activation_relu_or_gelu(self) -> int:  # 0 says that it may not
        return vars(self)["activation_relu_or_gelu"] if "_ffn_nested" in vars(self) else 0

    return {
        "forward": update_wrapper(forward, original.forward),
        "activation_relu_or_gelu": property(activation_relu_or_gelu),
    }
