"""The autograd rule of `feed_forward`: gradients to second order, saved elements, matmuls and memory."""

import itertools
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.timing import peak_bytes
from ffn import FeedForward
from ffn.activations import TABLE
from ffn.ops.feed_forward import feed_forward
from tests.kept import kept_for_backward
from tests.ops.samples import NAMES, Arguments, draw, gradients, leaf

SAVES = [{"save": "preact"}, {"save": "input"}, {"save": "input", "chunk_tokens": 2}]
names = pytest.mark.parametrize("name", NAMES)


@names
def test_saved_elements_exactly(name: str) -> None:
    N, D, H = 7, 6, 10
    hidden = 2 * H if TABLE[name].gated else H
    for bias, shape, dtype in ((True, (7,), torch.float64), (False, (1, 7), torch.bfloat16)):
        arguments = draw(name, bias=bias, shape=shape, dtype=dtype)
        for dropout, seed in ((0.0, {}), (0.3, {torch.int64: 1})):
            for save, elements in zip(SAVES, (D + hidden, D, D), strict=True):
                counts = kept_for_backward(
                    lambda a=arguments, p=dropout, s=save: feed_forward(*a, activation=name, dropout=p, **s),
                    arguments.given()[1:],
                )
                assert counts == {dtype: N * elements} | seed


@pytest.mark.parametrize("name", ["gelu", "swiglu"])
@pytest.mark.parametrize("options", SAVES, ids=str)
def test_flop_counter_sees_every_matmul(name: str, options: dict) -> None:
    arguments = draw(name, shape=(7,))
    with FlopCounterMode(display=False) as counter:
        y = feed_forward(*arguments, activation=name, **options)
        gradients(y, arguments, torch.ones_like(y))
    first = arguments.up.numel() * (2 if TABLE[name].gated else 1)  # save="input" repeats this matmul
    again = 2 * 7 * first if options["save"] == "input" else 0
    assert counter.get_total_flops() == 6 * 7 * (first + arguments.down.numel()) + again


def test_autocast_also_saves_the_cast_weights() -> None:
    arguments = draw("swiglu", dtype=torch.float32)

    def run() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return feed_forward(*arguments, activation="swiglu", dropout=0.1)

    weights = sum(t.numel() for t in arguments.given()[1:])
    counts = kept_for_backward(run, arguments.given())
    assert counts == {torch.bfloat16: 7 * (6 + 2 * 10) + weights, torch.int64: 1}


@names
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_gradcheck_and_gradgradcheck(name: str, bias: bool) -> None:
    arguments = draw(name, bias=bias, shape=(3,), widths=(2, 3, 2))
    given = [t is not None for t in arguments]
    for dropout, save in itertools.product((0.0, 0.4), SAVES):

        def run(*tensors: Tensor, p=dropout, options=save) -> Tensor:
            torch.manual_seed(3)  # the same mask for every call
            found = iter(tensors)
            return feed_forward(
                *(next(found) if has else None for has in given), activation=name, dropout=p, **options
            )

        assert torch.autograd.gradcheck(run, arguments.given())
        assert torch.autograd.gradgradcheck(run, arguments.given(), fast_mode=True)


@pytest.mark.parametrize("name", ["relu2", "geglu_tanh"])
def test_gradgradcheck_entry_by_entry(name: str) -> None:
    arguments = draw(name, bias=False, shape=(2,), widths=(2, 3, 2))
    given = [t is not None for t in arguments]

    def run(*tensors: Tensor) -> Tensor:
        found = iter(tensors)
        return feed_forward(*(next(found) if has else None for has in given), activation=name)

    assert torch.autograd.gradgradcheck(run, arguments.given())


def test_gradient_penalty_through_non_leaf_inputs() -> None:
    """The second derivative flows through x and the weights into the tensors they were computed from."""
    base = draw("swiglu")
    results = []
    for backend in ("eager", "reference"):
        a = base.to(torch.float64)
        scaled = a._replace(x=a.x * 2.0, up=a.up.sin())
        y = feed_forward(*scaled, activation="swiglu", backend=backend)
        (dx,) = torch.autograd.grad(y.sum(), a.x, create_graph=True)
        results.append(gradients(dx.square().sum() + y.sum(), a, torch.tensor(1.0)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


class Products(TorchDispatchMode):
    """Counts the matmuls that run, by any op."""

    OPS = ("mm", "addmm", "addmm_", "bmm", "_linear_pointwise")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ in self.OPS
        return func(*args, **(kwargs or {}))


def products(run: Callable[[], object]) -> int:
    with Products() as mode:
        run()
    return mode.count


@pytest.mark.parametrize("name", ["gelu", "swiglu"])
@pytest.mark.parametrize("save", SAVES[:2], ids=["preact", "input"])
def test_frozen_tensors_get_no_gradient_and_cost_no_matmul(name: str, save: dict) -> None:
    whole = draw(name)
    fields = [field for field, t in zip(Arguments._fields, whole, strict=True) if t is not None]
    gated = "gate" in fields

    def run(arguments: Arguments) -> Tensor:
        torch.manual_seed(5)
        return feed_forward(*arguments, activation=name, dropout=0.3, **save)

    dy = torch.randn(7, 5, dtype=torch.float64)
    expected = dict(zip(fields, gradients(run(whole), whole, dy), strict=True))
    for wants in itertools.product((True, False), repeat=len(fields)):
        want = {field for field, wanted in zip(fields, wants, strict=True) if wanted}
        a = Arguments(
            *(
                t if t is None or f in want else t.detach()
                for f, t in zip(Arguments._fields, whole, strict=True)
            )
        )
        y = run(a)
        assert y.requires_grad == bool(want)
        if not want:
            continue
        for t in whole.given():
            t.grad = None
        count = products(lambda y=y: y.backward(dy))
        for field, t in zip(fields, whole.given(), strict=True):
            assert (t.grad is not None) == (field in want)
            if t.grad is not None:
                torch.testing.assert_close(t.grad, expected[field])
        into_hidden = want - {"down", "down_bias"}
        replays = (1 + gated) * (save["save"] == "input" and want != {"down_bias"})
        needed = bool(into_hidden) + ("down" in want) + ("up" in want) + ("gate" in want)
        assert count == needed + ("x" in want) * (1 + gated) + replays


def test_forward_runs_two_or_three_matmuls() -> None:
    for name, wanted in (("gelu", 2), ("swiglu", 3)):
        arguments = draw(name)
        assert products(lambda n=name, a=arguments: feed_forward(*a, activation=n)) == wanted
        assert products(lambda n=name, a=arguments: feed_forward(*a, activation=n, save="input")) == wanted


@names
def test_backward_twice_gives_equal_gradients(name: str) -> None:
    for save in SAVES:
        arguments = draw(name)
        y = feed_forward(*arguments, activation=name, dropout=0.3, **save)
        dy = torch.randn_like(y)
        before = dy.clone()
        first = torch.autograd.grad(y, arguments.given(), dy, retain_graph=True)
        again = torch.autograd.grad(y, arguments.given(), dy, retain_graph=True)
        to_second_order = torch.autograd.grad(y, arguments.given(), dy, create_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert torch.equal(dy, before)
        for ours, theirs in zip(first, to_second_order, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)
        last = gradients(y, arguments, dy)  # may overwrite the saved tensors
        assert all(torch.equal(a, b) for a, b in zip(first, last, strict=True))
        with pytest.raises(RuntimeError, match="second time"):
            gradients(y, arguments, dy)


@pytest.mark.parametrize("name", ["gelu", "swiglu"])
def test_backward_reuses_the_saved_preactivations(name: str) -> None:
    N, D, H = 3000, 4, 40
    arguments = draw(name, shape=(N,), widths=(D, H, D))
    y = feed_forward(*arguments, activation=name)
    taken = peak_bytes(y.sum().backward, torch.device("cpu"))
    hidden = 2 if TABLE[name].gated else 1  # tensors of the hidden width
    assert taken < (hidden * H + D) * N * y.itemsize


@pytest.mark.parametrize("field", ["x", "up", "down", "gate", "up_bias", "down_bias", "gate_bias"])
def test_in_place_change_of_a_saved_tensor_raises(field: str) -> None:
    for save in SAVES:
        arguments = draw("swiglu", shape=(2, 3))
        y = feed_forward(*arguments, activation="swiglu", **save)
        with torch.no_grad():
            getattr(arguments, field).mul_(2.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            gradients(y, arguments, torch.ones_like(y))


def test_inputs_and_outputs_are_not_modified() -> None:
    for name in NAMES:
        arguments = draw(name)
        before = [t.detach().clone() for t in arguments.given()]
        for save in SAVES:
            y = feed_forward(*arguments, activation=name, dropout=0.3, **save)
            kept = y.detach().clone()
            gradients(y, arguments, torch.ones_like(y))
            assert torch.equal(y, kept)
        assert all(torch.equal(t, b) for t, b in zip(arguments.given(), before, strict=True))


def test_gradients_accumulate_into_leaves() -> None:
    arguments = draw("geglu")
    for _ in range(2):
        feed_forward(*arguments, activation="geglu").sum().backward()
    y = feed_forward(*arguments, activation="geglu")
    for t, once in zip(arguments.given(), gradients(y, arguments, torch.ones_like(y)), strict=True):
        torch.testing.assert_close(t.grad, 2.0 * once)


def test_tied_weights_sum_their_gradients() -> None:
    x, weight = leaf(torch.randn(4, 6)), leaf(torch.randn(6, 6))
    y = feed_forward(x, weight, weight, activation="silu")
    expected = torch.nn.functional.silu(x @ weight.t()) @ weight.t()
    ours, theirs = (torch.autograd.grad(out.sum(), (x, weight)) for out in (y, expected))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_vectorised_jacobian_and_hessian(activation: str, p: float) -> None:
    block = FeedForward(4, 6, p, activation=activation, dtype=torch.float64)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)

    def f(x: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(0)
        return block(x)

    jacobian, hessian = torch.autograd.functional.jacobian, torch.autograd.functional.hessian
    torch.testing.assert_close(jacobian(f, x, vectorize=True), jacobian(f, x))
    energy = lambda x: f(x).square().sum()  # noqa: E731
    torch.testing.assert_close(hessian(energy, x, vectorize=True), hessian(energy, x))


@pytest.mark.parametrize("name", ["gelu", "swiglu"])
def test_saved_tensor_hooks_and_selective_checkpointing(name: str) -> None:
    arguments = draw(name)
    run = partial(feed_forward, activation=name)
    want = gradients(run(*arguments), arguments, dy := torch.randn(7, 5, dtype=torch.float64))

    def products_kept(ctx, op, *args, **kwargs) -> CheckpointPolicy:
        kept = "mm" in str(op) or "linear" in str(op)
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = partial(create_selective_checkpoint_contexts, products_kept)
    ys = [checkpoint(run, *arguments, use_reentrant=False, context_fn=contexts)]
    for hooks in (torch.autograd.graph.save_on_cpu(), saved_tensors_hooks(lambda t: t, lambda t: t)):
        with hooks:
            ys.append(run(*arguments))
    for y in ys:
        for ours, theirs in zip(gradients(y, arguments, dy), want, strict=True):
            assert torch.equal(ours, theirs)
