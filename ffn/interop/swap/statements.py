"""Analyse statements of a method: which calls, reads and assignments they make, and whether they can move."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeGuard


@dataclass(frozen=True)
class Place:
    """The place of a chain: statements body[start:stop], and body[stop], which calls the last product.

    read: index of the statement that calls the last of the first products. argument: their input, x.
    """

    body: list[ast.stmt]
    start: int
    read: int
    stop: int
    argument: ast.expr


def is_closed(tree: ast.FunctionDef, place: Place, first: set[str], last: str) -> bool:
    """Return whether the statements can be taken out of the method.

    They may read only x at the first products, self, the dtype, device and shape of x, and globals; and no
    other statement may read the names that they assign.
    """
    run, final = place.body[place.start : place.stop], place.body[place.stop]
    ((_, call),) = calls_of(final, {last})
    x = place.argument.id if isinstance(place.argument, ast.Name) else None
    local = {a.arg for a in ast.walk(tree) if isinstance(a, ast.arg)} | _stored(tree)
    if not all(map(_movable, run)) or not all(_is_foreseen(node, local) for node in (*run, call)):
        return False
    skip = {id(n) for s in (*run, call) for _, c in calls_of(s, first) for n in ast.walk(c.args[0])}
    skip |= {id(n.value) for s in (*run, call) for n in ast.walk(s) if _is_kind(n) and _name(n.value) == x}
    known = {"self"}
    for node in (*run, call.args[0]):
        if (_loaded(node, skip) & local) - known:
            return False
        known |= _stored(node) if not isinstance(node, ast.If) else set()
    if any(x in _stored(s) for s in place.body[place.start : place.read]):
        return False  # the products read different values
    assigned = {name for node in (*run, call.args[0]) for name in _stored(node)}
    outside = {id(node) for s in (*run, call.args[0]) for node in ast.walk(s)}
    replaced = {t.id for t in getattr(final, "targets", []) if isinstance(t, ast.Name)}
    later = _loaded(tree, outside, after=place.body[place.start].lineno)
    return not (assigned & _loaded(final, outside)) and not ((assigned - replaced) & later)


def _is_foreseen(node: ast.AST, local: set[str]) -> bool:
    """Return whether its branches depend only on self and dtypes, which are probed, not on arguments."""
    for test in (n.test for n in ast.walk(node) if isinstance(n, ast.If | ast.IfExp)):
        dtypes = {id(n.value) for n in ast.walk(test) if isinstance(n, ast.Attribute) and n.attr == "dtype"}
        called = {_name(n.func) for n in ast.walk(test) if isinstance(n, ast.Call)}
        if _loaded(test, dtypes) & (local - {"self"}) or called - {"isinstance", "hasattr", "getattr"}:
            return False
    return True


def _is_kind(node: ast.AST) -> TypeGuard[ast.Attribute]:
    return isinstance(node, ast.Attribute) and node.attr in ("dtype", "device", "shape")


def _name(node: ast.AST) -> str | None:
    return node.id if isinstance(node, ast.Name) else None


def is_simple(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Assign | ast.AnnAssign | ast.Return | ast.Expr)


def _movable(statement: ast.stmt) -> bool:
    """Return whether the statement does nothing but assign names."""
    if is_text(statement):
        return True
    if isinstance(statement, ast.If):
        return all(_movable(s) for s in (*statement.body, *statement.orelse))
    targets = {ast.Assign: "targets", ast.AnnAssign: "target", ast.AugAssign: "target"}.get(type(statement))
    if targets is None:
        return False
    found: Any = getattr(statement, targets)
    nodes = [n for target in (found if isinstance(found, list) else [found]) for n in ast.walk(target)]
    return all(isinstance(n, ast.Name | ast.Tuple | ast.List | ast.expr_context) for n in nodes)


def is_text(statement: ast.stmt) -> bool:
    text = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    return text or isinstance(statement, ast.Pass)


def _stored(node: ast.AST) -> set[str]:
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}


def _loaded(node: ast.AST, skip: set[int], after: int = 0) -> set[str]:
    """Return the names read in node from line `after` on, or anywhere if it has a loop or an inner function.

    skip: ids of nodes that do not count.
    """
    nodes = list(ast.walk(node))
    repeated = ast.For | ast.While | ast.Lambda | ast.FunctionDef
    looped = any(isinstance(n, repeated) and n is not node for n in nodes)
    updated = {id(n.target) for n in nodes if isinstance(n, ast.AugAssign)}
    return {
        n.id
        for n in nodes
        if isinstance(n, ast.Name) and id(n) not in skip
        if not isinstance(n.ctx, ast.Store) or id(n) in updated
        if looped or n.lineno >= after
    }


def calls_of(node: ast.AST, names: set[str]) -> Iterator[tuple[str, ast.Call]]:
    """Yield the calls self.NAME(...) in the order of evaluation, the innermost first."""
    for child in ast.iter_child_nodes(node):
        yield from calls_of(child, names)
    if isinstance(node, ast.Call) and (name := _child(node.func)) in names:
        assert name is not None
        yield name, node


def _child(function: ast.expr) -> str | None:
    match function:
        case ast.Attribute(value=ast.Name(id="self"), attr=name):
            return name
        case ast.Call(func=ast.Name(id="getattr"), args=[ast.Name(id="self"), ast.Constant(value=str(name))]):
            return name
    return None
