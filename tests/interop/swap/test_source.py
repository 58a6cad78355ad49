"""source: chains are found in the forms that people write, and the rest of the method is kept."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ffn.interop.swap import source
from ffn.interop.swap.source import Chain, find_chains
from tests.interop.swap.written import Block, block, chains


def llama(self, x):
    return self.fc2(self.act(self.fc1(x)) * self.fc3(x))


def phi(self, x):
    pair = self.wide(x)
    gate, up = pair.chunk(2, dim=-1)
    up = up * self.act(gate)
    return self.fc2(up)


def t5(self, x):
    """With a docstring."""
    x = self.fc1(x)
    x = self.act(x)
    x = self.dropout(x)
    if isinstance(self.fc2.weight, Tensor) and x.dtype != self.fc2.weight.dtype:
        x = x.to(self.fc2.weight.dtype)
    x = self.fc2(x)
    return x  # noqa: RET504


def opt(self, hidden, mask=None):
    shape = hidden.shape
    hidden = hidden.reshape(-1, hidden.size(-1))
    residual = hidden
    hidden = self.norm(hidden)
    hidden = self.fc1(hidden)
    hidden = self.act(hidden)
    hidden = F.dropout(hidden, p=self.dropout.p, training=self.training)
    hidden = self.fc2(hidden)
    hidden = (residual + hidden).view(shape)
    return hidden if mask is None else hidden * mask


def in_a_branch(self, x, twice: bool = False):
    if twice:
        return 2 * self.fc2(self.act(self.fc1(x)))
    return x


def of_an_expression(self, x):
    h = self.fc1(self.norm(x) + 1)
    x = self.act(h)
    return self.fc2(x)


def by_getattr(self, x):
    return getattr(self, "fc2")(self.act(getattr(self, "fc1")(x)))  # noqa: B009


def two_on_one_line(self, x):
    a, b = self.fc1(x), self.fc3(x)
    return self.norm(self.fc2(self.act(a) * b))


FOUND = {
    llama: (("fc1", "fc3"), "fc2"),
    phi: (("wide",), "fc2"),
    t5: (("fc1",), "fc2"),
    opt: (("fc1",), "fc2"),
    in_a_branch: (("fc1",), "fc2"),
    of_an_expression: (("fc1",), "fc2"),
    by_getattr: (("fc1",), "fc2"),
    two_on_one_line: (("fc1", "fc3"), "fc2"),
}


class Told(nn.Module):
    """Has the method that rewritten code calls, which runs the old code."""

    def _ffn_reroute(self, x):
        caught = []
        handle = self.fc2.register_forward_pre_hook(lambda _, args: caught.append(args[0]))
        source.inner(type(self).__bases__[1], self.chain)(self, x)
        handle.remove()
        self.calls = getattr(self, "calls", 0) + 1
        return self.fc2(caught[0])


@pytest.mark.parametrize("forward", FOUND, ids=lambda f: f.__name__)
def test_a_chain_is_found_and_replaced(forward) -> None:
    module, x = block(forward), torch.randn(2, 3, 4, dtype=torch.float64)
    (chain,) = chains(module)
    assert (chain.method, chain.first, chain.last) == ("forward", *FOUND[forward])
    arguments = (x, True) if forward is in_a_branch else (x,)
    expected = module(*arguments)
    rewritten = source.rewrite(type(module), chain)
    assert rewritten.__code__.co_filename == __file__
    assert not {"fc1", "fc3", "wide", "act"} & set(rewritten.__code__.co_names)
    module.__class__ = type("Told", (Told, type(module)), {"chain": chain, "forward": rewritten})
    assert torch.equal(module(*arguments), expected)
    assert module.calls == 1


def test_the_rest_of_the_method_keeps_its_defaults_annotations_and_closure() -> None:
    scale = 2.0

    def forward(self, x: "torch.Tensor", k: float = scale, *rest: "Absent", extra: "Absent" = scale):  # type: ignore[name-defined] # noqa: F821
        return self.fc2(self.act(self.fc1(x))) * k * extra * scale

    module, x = block(forward), torch.randn(3, 4, dtype=torch.float64)
    (chain,) = chains(module)
    before = module(x)
    rewritten = source.rewrite(type(module), chain)
    module.__class__ = type("Told", (Told, type(module)), {"chain": chain, "forward": rewritten})
    assert torch.equal(module(x), before)
    scale = 3.0  # the closure must be the method's own, not a copy
    assert torch.allclose(module(x), before * 1.5)


def test_a_chain_may_end_in_a_module_that_holds_the_product() -> None:
    class First(nn.Module):
        def __init__(self):
            super().__init__()
            self.dense, self.act = nn.Linear(4, 6), nn.GELU()

        def forward(self, x):
            return self.act(self.dense(x))

    class Second(nn.Module):
        def __init__(self):
            super().__init__()
            self.dense, self.norm = nn.Linear(6, 4), nn.LayerNorm(4)

        def forward(self, h, residual):
            h = self.dense(h)
            return self.norm(h + residual)

    class Bert(nn.Module):
        def __init__(self):
            super().__init__()
            self.intermediate, self.output = First(), Second()

        def feed(self, x):
            h = self.intermediate(x)
            return self.output(h, x)

    (chain,) = find_chains(Bert(), {"intermediate"}, {"output"})
    assert chain == Chain("feed", ("intermediate",), "output", holds=True)
    second, h, x = Second(), torch.randn(3, 6), torch.randn(3, 4)
    tail = source.tail(Second.forward, "dense")
    assert tail is not None
    assert torch.equal(tail(second, second.dense(h), x), second(h, x))
    assert source.tail(Second.forward, "norm") is None
    assert source.tail(First.forward, "act") is None


@pytest.mark.parametrize("inside", [(), (nn.Dropout(0.1),), (nn.Dropout(0.1), nn.Identity())])
def test_a_sequential_is_read_as_calls_of_its_layers(inside: tuple) -> None:
    module = nn.Sequential(nn.Linear(4, 6), nn.GELU(), *inside, nn.Linear(6, 4), nn.Tanh())
    last = str(len(module) - 2)
    (chain,) = find_chains(module, {"0", last}, set())
    names = tuple(str(i) for i in range(len(module)))
    assert chain == Chain("forward", ("0",), last, sequence=names)
    x = torch.randn(2, 4)
    h = source.rewrite(nn.Sequential, chain)
    module._ffn_reroute = lambda x: x + 1  # type: ignore[assignment]
    assert torch.equal(h(module, x), (x + 1).tanh())
    gelu = nn.GELU()
    twice = nn.Sequential(nn.Linear(4, 6), gelu, nn.Linear(6, 4), gelu)
    assert find_chains(twice, {"0", "2"}, set())[0].sequence == ("0", "1", "2", "3")


def decided(self, x):
    if self.mode == "plain" and not self.flag:
        h = self.act(self.fc1(x))
    elif self.kind is None or self.mode == "gated":
        h = self.act(self.fc1(x)) * self.fc3(x)
    else:
        h = x
    return self.fc2(h)


def test_branches_are_decided_by_the_modules_attributes() -> None:
    gated = block(decided, mode="gated", kind="odd")
    assert [c.first for c in chains(gated)] == [("fc1", "fc3")]
    assert dict(chains(gated)[0].facts) == {"mode": "gated", "flag": True, "kind": "odd"}
    assert [c.first for c in chains(block(decided, mode="plain", kind="odd", flag=False))] == [("fc1",)]
    assert chains(block(decided, mode="other", kind="odd")) == []
    assert chains(block(decided, mode=object(), kind="odd")) == [], "no plain value"


def test_super_outside_of_the_chain_still_works() -> None:
    class Parent(Block):
        def forward(self, x):
            return x + 1

    class Child(Parent):
        def forward(self, x):
            x = super().forward(x)
            return self.fc2(self.act(self.fc1(x)))

    module, x = Child(), torch.randn(3, 4, dtype=torch.float64)
    (chain,) = chains(module)
    expected = module(x)
    rewritten = source.rewrite(Child, chain)
    module.__class__ = type("Told", (Told, Child), {"chain": chain, "forward": rewritten})
    assert torch.equal(module(x), expected)


def test_inherited_methods_are_searched_but_not_special_ones() -> None:
    class Parent(Block):
        def feed(self, x):
            return self.fc2(self.act(self.fc1(x)))

        def __call__(self, x):
            return self.fc2(self.dropout(self.fc1(x)))

    class Child(Parent):
        def forward(self, x):
            return x + self.feed(x)

    assert [c.method for c in chains(Child())] == ["feed"]


def test_a_missing_chain_raises() -> None:
    with pytest.raises(ValueError, match=r"forward has changed: \('fc3',\) to fc2 not found"):
        source.inner(type(block(t5)), Chain("forward", ("fc3",), "fc2"))
