"""statements: calls in order of evaluation, and kinds of statements; test_source tests the rest."""

import ast

import pytest

from ffn.interop.swap.statements import calls_of, is_simple, is_text


def statement(text: str) -> ast.stmt:
    return ast.parse(text).body[0]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("y = self.c(self.a(x), self.b(x))", ["a", "b", "c"]),
        ("y = getattr(self, 'a')(other.b(x))", ["a"]),
        ("if self.a(x):\n    self.b(x)\nelse:\n    self.c(x)", ["a", "b", "c"]),
        ("y = self.a.b(x) + a(x) + self.d(x)", []),
    ],
)
def test_calls_come_in_order_of_evaluation(text: str, names: list[str]) -> None:
    assert [name for name, _ in calls_of(statement(text), {"a", "b", "c"})] == names


@pytest.mark.parametrize(
    ("text", "simple", "silent"),
    [("y = 1", True, False), ("return y", True, False), ("'text'", True, True), ("pass", False, True)],
)
def test_kinds_of_statements(text: str, simple: bool, silent: bool) -> None:
    assert (is_simple(statement(text)), is_text(statement(text))) == (simple, silent)
