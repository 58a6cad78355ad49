"""Find in the source of a method where it computes last(inner(first(x))) on children of its module.

A feed-forward block may be a module of its own or a few lines in the middle of a layer:

    residual = hidden
    hidden = self.norm(hidden)
    hidden = self.fc1(hidden)                  the chain: from the statement of the first product
    hidden = self.activation(hidden)
    hidden = self.fc2(hidden)                  to the call of the last
    return residual + hidden

`find_chains` finds such statements; `inner` makes a function of the code between the products, for probing;
`rewrite` makes the method with the chain replaced by one call. Both are compiled from the method's own
statements, so the rest of the method stays the same. Statements that cannot be moved safely are not a chain.
"""

import ast
import copy
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from types import FunctionType
from typing import Any

from torch import nn

from ffn.interop.swap.statements import Place, calls_of, is_closed, is_simple, is_text
from ffn.interop.swap.syntax import function_of, is_what_runs, tree_of, written

X = "_ffn_x"  # the block's input, in the functions made here
REROUTE, TAIL = "_ffn_reroute", "_ffn_tail"  # the methods that a rewritten method calls
TAILS: dict[tuple[FunctionType, str], FunctionType | None] = {}  # cache of `tail`, which a compiler can read


@dataclass(frozen=True)
class Chain:
    """The statements in `method` from the calls of the children `first` (one or two) to the call of `last`.

    holds: True if `last` is not the product itself but a module with a forward that begins with the product.
    sequence: names of the children of an nn.Sequential, which has no such statements: they are made up.
    facts: (attribute, value) of the module, which decided the branches.
    """

    method: str
    first: tuple[str, ...]
    last: str
    holds: bool = False
    sequence: tuple[str, ...] = ()
    facts: tuple[tuple[str, Any], ...] = ()


def find_chains(module: nn.Module, products: set[str], holders: set[str]) -> list[Chain]:
    """Return the chains in the methods of `module`.

    If there are none, look again with each `if` replaced by the branch that the module's attributes choose.

    Args:
        products: names of children that are products, or that hold one or two.
        holders: names of children with a forward that begins with a product; they can end a chain.
    """
    cls = type(module)
    sequence = tuple(module._modules) if cls.forward is nn.Sequential.forward else ()
    for facts in ((), tuple(_facts(module))):
        found = [
            chain
            for method in (["forward"] if sequence else _methods(cls))
            for chain in _chains(cls, Chain(method, (), "", False, sequence, facts), products, holders)
        ]
        if found:
            return list(dict.fromkeys(found))
    return []


def _chains(cls: type, blank: Chain, products: set[str], holders: set[str]) -> Iterator[Chain]:
    """Yield the chains in one method."""
    tree = _tree(cls, blank.method, blank.sequence, blank.facts)
    if tree is None:
        return
    for body in _bodies(tree):
        calls = [name for statement in body for name, _ in calls_of(statement, products | holders)]
        for end, last in enumerate(calls):
            for count in (2, 1):
                first = tuple(calls[max(end - count, 0) : end])
                chain = replace(blank, first=first, last=last, holds=last in holders)
                found = len({*first, last}) == count + 1 and _locate(tree, chain) is not None
                if found and is_what_runs(written(cls, blank.method)):
                    yield chain


@cache
def inner(cls: type, chain: Chain) -> FunctionType:
    """Return f(self, x): the code of the method from x up to the call of the last product, with that call."""
    tree, place = _found(cls, chain)
    run = place.body[place.start : place.stop + 1]
    ((_, call),) = calls_of(run[-1], {chain.last})
    call.args[1:] = [ast.Constant(None) for _ in call.args[1:]]
    statements = [*run[:-1], ast.Expr(call)]
    for statement in statements:
        for _, first in calls_of(statement, set(chain.first)):
            first.args = [ast.Name(X, ast.Load())]
    if isinstance(place.argument, ast.Name):
        statements = [*ast.parse(f"{place.argument.id} = {X}").body, *statements]
    tree.args = ast.parse(f"def f(self, {X}): ...").body[0].args  # type: ignore[attr-defined]
    tree.body = statements
    return _function(cls, chain, tree)


def rewrite(cls: type, chain: Chain) -> FunctionType:
    """Return the method with its chain replaced by `self._ffn_reroute(x)`.

    If `last` holds the product, a call of `self._ffn_tail` runs the rest of its forward.
    """
    tree, place = _found(cls, chain)
    statement = place.body[place.stop]
    ((_, call),) = calls_of(statement, {chain.last})
    rerouted = ast.Call(_attribute(REROUTE), [place.argument], [])
    if chain.holds:
        call.args = [call.func, rerouted, *call.args[1:]]
        call.func = _attribute(TAIL)
    else:
        _replace(statement, call, rerouted)
    del place.body[place.start : place.stop]
    return _function(cls, chain, tree)


def tail(forward: FunctionType, product: str) -> FunctionType | None:
    """Return f(self, y, ...): a forward that begins with the product, without the product.

    Return None if the forward does not begin with it.
    """
    if (forward, product) not in TAILS:
        TAILS[forward, product] = _tail(forward, product)
    return TAILS[forward, product]


def _tail(forward: FunctionType, product: str) -> FunctionType | None:
    tree = copy.deepcopy(tree_of(forward))
    if tree is None or len(tree.args.args) < 2 or not is_what_runs(forward):
        return None
    given = tree.args.args[1].arg
    found = [(statement, call) for statement in tree.body for _, call in calls_of(statement, {product})]
    if len(found) != 1:
        return None
    statement, call = found[0]
    before = tree.body[: tree.body.index(statement)]
    if not all(map(is_text, before)) or [ast.unparse(a) for a in call.args] != [given]:
        return None
    _replace(statement, call, call.args[0])
    return function_of(forward, tree)


def _found(cls: type, chain: Chain) -> tuple[ast.FunctionDef, Place]:
    tree = copy.deepcopy(_tree(cls, chain.method, chain.sequence, chain.facts))
    place = tree and _locate(tree, chain)
    if tree is None or place is None:
        raise ValueError(
            f"{cls.__qualname__}.{chain.method} has changed: {chain.first} to {chain.last} not found"
        )
    return tree, place


def _methods(cls: type) -> list[str]:
    names: dict[str, None] = {}
    for base in cls.__mro__[: cls.__mro__.index(nn.Module)]:
        names |= {name: None for name, value in vars(base).items() if inspect.isfunction(value)}
    return [name for name in names if not name.startswith("__")]


def _tree(
    cls: type, method: str, sequence: tuple[str, ...] = (), facts: tuple = ()
) -> ast.FunctionDef | None:
    if sequence:
        lines = [f"    input = getattr(self, {name!r})(input)" for name in sequence]
        (tree,) = ast.parse("\n".join(["def forward(self, input):", *lines, "    return input"])).body
        assert isinstance(tree, ast.FunctionDef)
        return tree
    tree = tree_of(written(cls, method))
    return _Decided(dict(facts)).visit(copy.deepcopy(tree)) if tree is not None and facts else tree


def _facts(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield (name, value) of the module's attributes with plain values that its methods read in an `if`."""
    names: set[str] = set()
    for method in _methods(type(module)):
        tree = _tree(type(module), method)
        tests = [node.test for node in ast.walk(tree) if isinstance(node, ast.If)] if tree is not None else []
        names |= {n.attr for test in tests for n in ast.walk(test) if isinstance(n, ast.Attribute)}
    for name in sorted(names & set(vars(module))):
        value = vars(module)[name]
        if name != "training" and isinstance(value, bool | int | float | str):
            yield name, value


class _Decided(ast.NodeTransformer):
    """Replace each `if` that reads only these attributes of self by the branch taken."""

    def __init__(self, facts: dict[str, Any]):
        self.facts = facts

    def visit_If(self, node: ast.If):
        self.generic_visit(node)
        allowed = ast.BoolOp | ast.boolop | ast.UnaryOp | ast.unaryop | ast.Compare | ast.cmpop | ast.Constant
        test = _Filled(self.facts).visit(copy.deepcopy(node.test))
        if not all(isinstance(n, allowed) for n in ast.walk(test)):
            return node
        expression = ast.fix_missing_locations(ast.Expression(test))
        taken = (
            node.body if eval(compile(expression, "<test>", "eval"), {"__builtins__": {}}) else node.orelse
        )
        return taken or ast.copy_location(ast.Pass(), node)


class _Filled(ast.NodeTransformer):
    """Replace self.NAME by the value of the attribute."""

    def __init__(self, facts: dict[str, Any]):
        self.facts = facts

    def visit_Attribute(self, node: ast.Attribute):
        known = isinstance(node.value, ast.Name) and node.value.id == "self" and node.attr in self.facts
        return ast.copy_location(ast.Constant(self.facts[node.attr]), node) if known else node

    def visit_Is(self, node: ast.Is):
        return ast.Eq()  # the same for the plain values here

    def visit_IsNot(self, node: ast.IsNot):
        return ast.NotEq()


def _bodies(tree: ast.AST) -> Iterator[list[ast.stmt]]:
    for node in ast.walk(tree):
        for field in ("body", "orelse", "finalbody"):
            statements = getattr(node, field, None)
            if isinstance(statements, list) and statements and isinstance(statements[0], ast.stmt):
                yield statements


def _locate(tree: ast.FunctionDef, chain: Chain) -> Place | None:
    """Return the place of the chain, if its statements can be taken out of the method."""
    for body in _bodies(tree):
        stops = [i for i, s in enumerate(body) if is_simple(s) and any(calls_of(s, {chain.last}))]
        for stop in stops:
            place = _place(body, stop, chain)
            if place is not None and is_closed(tree, place, set(chain.first), chain.last):
                return place
    return None


def _place(body: list[ast.stmt], stop: int, chain: Chain) -> Place | None:
    last = [call for _, call in calls_of(body[stop], {chain.last})]
    if len(last) != 1 or not last[0].args:
        return None
    firsts: dict[str, tuple[int, ast.Call]] = {}
    for index in range(stop, -1, -1):
        for name, call in calls_of(body[index], set(chain.first)):
            firsts.setdefault(name, (index, call))
        if len(firsts) == len(chain.first):
            break
    else:
        return None
    start, read = min(i for i, _ in firsts.values()), max(i for i, _ in firsts.values())
    if any(call not in ast.walk(last[0]) for index, call in firsts.values() if index == stop):
        return None
    calls = [call for s in body[start : stop + 1] for _, call in calls_of(s, set(chain.first))]
    arguments = {ast.dump(call.args[0]) for call in calls if len(call.args) == 1 and not call.keywords}
    if len(calls) != len(chain.first) or len(arguments) != 1 or any(len(call.args) != 1 for call in calls):
        return None
    argument = calls[0].args[0]
    if len(calls) > 1 and not isinstance(argument, ast.Name):
        return None
    return Place(body, start, read, stop, copy.deepcopy(argument))


def _attribute(name: str) -> ast.Attribute:
    return ast.Attribute(ast.Name("self", ast.Load()), name, ast.Load())


def _replace(statement: ast.AST, old: ast.AST, new: ast.AST) -> None:
    class Replacing(ast.NodeTransformer):
        def visit(self, node):
            return new if node is old else self.generic_visit(node)

    Replacing().visit(statement)


def _function(cls: type, chain: Chain, tree: ast.FunctionDef) -> FunctionType:
    file = f"<the steps of {cls.__qualname__}>" if chain.sequence else None
    return function_of(written(cls, chain.method), tree, file)
