"""syntax: the tree of a function, and functions made from trees."""

import ast
import inspect

from ffn.interop.swap import syntax
from ffn.interop.swap.syntax import function_of, is_what_runs, tree_of


class Text:
    def told(self, name: str = "a", *rest: int, end="!", **more) -> str:
        """In several
        lines."""
        lines = """one
two"""
        return f"""{lines}
{name}""" + end + str((rest, more))  # fmt: skip


def test_an_unchanged_tree_gives_the_same_function() -> None:
    tree = tree_of(Text.told)
    assert tree is not None
    assert tree.lineno == Text.told.__code__.co_firstlineno
    again = function_of(Text.told, tree)
    assert is_what_runs(again)
    assert inspect.getsource(again) == inspect.getsource(Text.told)
    assert again.__qualname__ == "Text.told"
    for arguments, named in (((), {}), (("b", 1, 2), {"end": "?", "other": 3})):
        assert again(Text(), *arguments, **named) == Text().told(*arguments, **named)


def test_a_changed_tree_gives_another_function() -> None:
    changed = ast.parse("def told(self): return missing").body[0]
    assert isinstance(changed, ast.FunctionDef)
    function = function_of(Text.told, changed)
    assert function.__globals__ is Text.told.__globals__
    assert function.__defaults__ is None
    assert not is_what_runs(function)


def test_only_plain_functions_have_a_tree() -> None:
    assert tree_of(len) is None
    assert tree_of(Text) is None
    assert tree_of(lambda self: 1) is None
    assert syntax.written(Text, "told") is Text.told
