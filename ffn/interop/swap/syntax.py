"""Turn a method into a syntax tree, and a changed tree into a function that replaces the method."""

import __future__

import ast
import inspect
import warnings
from collections.abc import Callable, Iterator
from functools import cache, lru_cache
from types import CodeType, FunctionType


def written(cls: type, method: str) -> FunctionType:
    """Return the method as its author wrote it.

    transformers wraps the forward of a layer in each subclass, for gradient checkpointing. It will wrap the
    subclasses made here too, so this wrapper is removed.
    """
    function = getattr(cls, method)
    while getattr(function, "__globals__", {}).get("__name__") == "transformers.modeling_layers":
        if function.__code__.co_name != "forward_with_checkpointing":
            break
        function = function.__wrapped__
    return function


@cache
def tree_of(function: Callable) -> ast.FunctionDef | None:
    """Return the tree of a function, with the line numbers of its file. It is shared: copy before a change.

    Return None if the source is not available or does not tell all that runs: the function is decorated or
    wraps another one, or it uses names that depend on their class (`__name`) or scope (`global`, `nonlocal`).
    """
    if type(function) is not FunctionType or hasattr(function, "__wrapped__"):
        return None
    try:
        lines, first = inspect.getsourcelines(function)
        nested = lines[0][:1].isspace()  # textwrap.dedent would change multi-line strings
        with warnings.catch_warnings(action="ignore"):  # about invalid escapes in their strings
            (tree,) = ast.parse("".join(["if 1:\n"] * nested + lines)).body
    except (OSError, TypeError, SyntaxError):  # built in, or typed at a prompt
        return None
    if nested and isinstance(tree, ast.If):
        (tree,) = tree.body
    if not isinstance(tree, ast.FunctionDef) or tree.decorator_list or getattr(tree, "type_params", ()):
        return None
    ast.increment_lineno(tree, first - 1 - nested)
    return None if any(map(_is_of_its_scope, ast.walk(tree))) else tree


@cache
def is_what_runs(function: FunctionType) -> bool:
    """Return whether the source still matches the code: the file may have changed since its import."""
    try:
        lines, _ = inspect.findsource(function)
        codes = _codes("".join(lines), function.__code__.co_filename)
    except (OSError, SyntaxError):
        return False
    line = function.__code__.co_firstlineno
    return any(code.co_firstlineno == line and _same(code, function.__code__) for code in codes)


def function_of(function: FunctionType, tree: ast.FunctionDef, file: str | None = None) -> FunctionType:
    """Return the function that the tree defines, with the globals, closure and defaults of `function`.

    file: the file name in tracebacks; by default that of `function`.
    """
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    outer, made = (ast.parse(f"def {name}(): ...").body[0] for name in ("outer", tree.name))
    assert isinstance(outer, ast.FunctionDef)
    assert isinstance(made, ast.FunctionDef)
    outer.args.args = [ast.arg(name) for name in cells]
    made.args, made.body, outer.body = _bare(tree.args), tree.body, [ast.copy_location(made, tree)]
    module = ast.fix_missing_locations(ast.Module([outer], []))
    flags = function.__code__.co_flags & __future__.annotations.compiler_flag
    code = compile(module, file or function.__code__.co_filename, "exec", flags, dont_inherit=True)
    for name in (outer.name, made.name):
        code = next(c for c in code.co_consts if isinstance(c, CodeType) and c.co_name == name)
    closure = tuple(cells[name] for name in code.co_freevars)
    defaults = function.__defaults__ if tree.args.defaults else None
    result = FunctionType(code, function.__globals__, tree.name, defaults, closure)
    result.__qualname__ = function.__qualname__
    result.__kwdefaults__ = function.__kwdefaults__ if tree.args.kwonlyargs else None  # type: ignore[assignment]
    return result


def _bare(given: ast.arguments) -> ast.arguments:
    """Return the names of the arguments, without annotations and defaults, which are already evaluated."""

    def bare(arguments: list[ast.arg]) -> list[ast.arg]:
        return [ast.arg(a.arg) for a in arguments]

    return ast.arguments(
        bare(given.posonlyargs), bare(given.args), given.vararg and ast.arg(given.vararg.arg),
        bare(given.kwonlyargs), [None] * len(given.kwonlyargs), given.kwarg and ast.arg(given.kwarg.arg), [],
    )  # fmt: skip


def _is_of_its_scope(node: ast.AST) -> bool:
    name = getattr(node, "attr", getattr(node, "id", ""))
    return isinstance(node, ast.Global | ast.Nonlocal) or (name[:2] == "__" and name[-2:] != "__")


@lru_cache(maxsize=16)
def _codes(text: str, file: str) -> list[CodeType]:
    """Return the code of every function in a file."""

    def below(code: CodeType) -> Iterator[CodeType]:
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                yield constant
                yield from below(constant)

    with warnings.catch_warnings(action="ignore"):
        return list(below(compile(text, file, "exec", dont_inherit=True)))


def _same(a: CodeType, b: CodeType) -> bool:
    fields = ("co_name", "co_code", "co_names", "co_varnames", "co_freevars", "co_cellvars", "co_argcount")
    if any(getattr(a, field) != getattr(b, field) for field in fields) or len(a.co_consts) != len(
        b.co_consts
    ):
        return False
    for c, d in zip(a.co_consts, b.co_consts, strict=True):
        codes = isinstance(c, CodeType) and isinstance(d, CodeType)
        if not (_same(c, d) if codes else type(c) is type(d) and c == d):
            return False
    return True
