"""source: no chain where taking lines out changes something, or where the source cannot be trusted."""

import functools
import importlib.util
import sys

import pytest
import torch
from torch.nn import functional as F

from tests.interop.swap.written import Block, block, chains


def other_local(self, x):
    y = x + 1
    return self.fc2(self.act(self.fc1(x)) * y.sum())


def argument(self, x, scale=2.0):
    return self.fc2(self.act(self.fc1(x)) * scale)


def residual_inside(self, x):
    return self.fc2(self.act(self.fc1(x)) + x.sum())


def read_later(self, x):
    h = self.act(self.fc1(x))
    return self.fc2(h), h


def read_in_the_final_line(self, x):
    h = self.act(self.fc1(x))
    return self.fc2(h) + h.sum()


def added_to_later(self, x):
    h = self.act(self.fc1(x))
    y = self.fc2(h)
    h += 1
    return y


def deleted_later(self, x):
    h = self.act(self.fc1(x))
    y = self.fc2(h)
    del h
    return y


def read_in_a_closure(self, x):
    later = lambda: h.sum()  # noqa: E731
    h = self.act(self.fc1(x))
    y = self.fc2(h)
    return y + later()


def loop(self, x):
    h = self.fc1(x)
    for _ in range(2):
        h = self.act(h)
    return self.fc2(h)


def around_a_loop(self, x):
    h = x.new_zeros(())
    for _ in range(2):
        x = x + h.sum()
        h = self.act(self.fc1(x))
        x = self.fc2(h)
    return x


def writes_an_attribute(self, x):
    self.seen = h = self.act(self.fc1(x))
    return self.fc2(h)


def writes_an_element(self, x):
    h = self.act(self.fc1(x))
    h[..., 0] = 0
    return self.fc2(h)


def statement_for_its_effect(self, x):
    h = self.act(self.fc1(x))
    self.ms.append(h)
    return self.fc2(h)


def hangs_on_the_shape(self, x):
    h = self.fc1(x)
    h = self.act(h) if h.shape[0] > 1 else F.relu(h)
    return self.fc2(h)


def hangs_on_the_value(self, x):
    h = self.fc1(x)
    if h.max() > 100:
        h = F.relu(h)
    return self.fc2(self.act(h))


def hangs_on_what_is_global(self, x):
    h = self.act(self.fc1(x))
    if torch.is_grad_enabled():
        h = h * 2
    return self.fc2(h)


def product_called_twice(self, x):
    return self.fc2(self.act(self.fc1(x)) + self.fc1(x))


def another_x(self, x):
    a = self.act(self.fc1(x))
    x = x + 1
    return self.fc2(a * self.fc3(x))


def other_arguments(self, x):
    return self.fc2(self.act(self.fc1(x)) * self.fc3(x + 1))


def product_not_of_the_chain(self, x):
    return self.fc2(self.act(x)) + self.fc1(x)


def context_between(self, x):
    h = self.fc1(x)
    with torch.no_grad():
        h = self.act(h)
    return self.fc2(h)


def global_name(self, x):
    global hidden
    hidden = self.act(self.fc1(x))
    return self.fc2(hidden)


def adds_to_another(self, x):
    y = x.sum()
    y += self.act(self.fc1(x))
    return self.fc2(y)


def wrapper(function):
    @functools.wraps(function)
    def wrapped(self, *args):
        return 2 * function(self, *args)

    return wrapped


@wrapper
def decorated(self, x):
    return self.fc2(self.act(self.fc1(x)))


REFUSED = [
    other_local, argument, residual_inside, read_later, read_in_the_final_line, added_to_later, deleted_later,
    read_in_a_closure, loop, around_a_loop, writes_an_attribute, writes_an_element, statement_for_its_effect,
    hangs_on_the_shape, hangs_on_the_value, hangs_on_what_is_global, product_called_twice, another_x,
    other_arguments, product_not_of_the_chain, context_between, global_name, adds_to_another, decorated,
]  # fmt: skip


@pytest.mark.parametrize("forward", REFUSED, ids=lambda f: f.__name__)
def test_statements_that_cannot_be_taken_out_are_no_chain(forward) -> None:
    assert chains(block(forward)) == []


def test_mangled_names_are_refused() -> None:
    class Mangled(Block):
        __scale = 2.0

        def forward(self, x):
            return self.fc2(self.act(self.fc1(x))) * self.__scale

    assert chains(Mangled()) == []


def test_without_source_there_is_no_chain() -> None:
    scope: dict = {}
    exec("def forward(self, x):\n    return self.fc2(self.act(self.fc1(x)))\n", scope)
    assert chains(block(scope["forward"])) == []
    assert chains(block(lambda self, x: self.fc2(self.act(self.fc1(x))))) == []
    assert chains(block(torch.relu)) == []


def test_a_file_changed_since_its_import_is_refused(tmp_path, monkeypatch) -> None:
    text = "def forward(self, x):\n    return self.fc2(self.act(self.fc1(x)))\n"
    path = tmp_path / "changing.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location("changing", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "changing", module)
    spec.loader.exec_module(module)
    path.write_text(text.replace("self.act", "self.dropout"))
    assert chains(block(module.forward)) == []
    path.write_text(text)
    again = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(again)
    assert len(chains(block(again.forward))) == 1
