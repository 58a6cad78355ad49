"""The block under torch.compile, torch.export and torch.func."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vmap

from ffn.activations import TABLE
from ffn.nn import FeedForward
from ffn.ops.dropout import dropout
from tests.kept import kept_for_backward
from tests.ops.samples import F64, NAMES, SAVES

# Warnings of torch 2.13 about itself: Inductor and forward-mode differentiation still script functions, and
# Dynamo instantiates autograd contexts.
pytestmark = [
    pytest.mark.usefixtures("nothing_compiled"),
    pytest.mark.filterwarnings(r"ignore:`torch\.jit\.\w+` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings(r"ignore:.*should not be instantiated:DeprecationWarning"),
]


def build(name: str = "gelu", dropout: float = 0.0, **options) -> FeedForward:
    return FeedForward(6, 10, dropout, out_dim=5, activation=name, dtype=F64, **options)


def compiled(block: Callable, backend: str = "aot_eager", **options) -> Callable:
    return torch.compile(block, fullgraph=True, backend=backend, **options)


def rows(count: int) -> Tensor:
    return torch.randn(count, 6, dtype=F64, requires_grad=True)


def outcome(call: Callable, block: nn.Module, x: Tensor) -> list[Tensor]:
    y = call(x)
    return [y, *torch.autograd.grad(y.square().sum(), [x, *block.parameters()])]


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("save", SAVES[1:], ids=["input", "chunks"])
@pytest.mark.parametrize("shape", [(6,), (2, 4, 6), (0, 6)], ids=str)
def test_compiled_in_every_mode_and_shape(save: dict, shape: tuple[int, ...]) -> None:
    block, x = build("swiglu", **save), torch.randn(shape, dtype=F64, requires_grad=True)
    assert_same(outcome(compiled(block), block, x), outcome(block, block, x))


@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
def test_compiled_by_inductor(dynamic: bool | None) -> None:
    block, x = build("swiglu"), rows(7)
    call = compiled(block, "inductor", dynamic=dynamic)
    assert_same(outcome(call, block, x), outcome(block, block, x))


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("save", SAVES[:2], ids=["preact", "input"])
def test_one_graph_for_all_token_counts(dropout: float, save: dict) -> None:
    block = build("geglu", dropout, **save)
    call = compiled(block, dynamic=True)
    call(rows(5)).sum().backward()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for count in (2, 3, 64, 17):
            x = rows(count)
            y = call(x)
            y.sum().backward()
            if not dropout:
                torch.testing.assert_close(y, block(x))


def test_a_second_length_makes_the_graph_dynamic_and_the_third_costs_nothing() -> None:
    block = build("gelu")
    call = compiled(block)
    call(rows(5)).sum().backward()
    call(rows(7)).sum().backward()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for count in (9, 33):
            call(rows(count)).sum().backward()


def kept(call: Callable, block: nn.Module, x: Tensor) -> dict[torch.dtype, int]:
    return kept_for_backward(lambda: call(x), block.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_compiled_equals_eager_and_saves_no_more(name: str) -> None:
    block, x = build(name), rows(7)
    call = compiled(block)
    assert_same(outcome(call, block, x), outcome(block, block, x))
    assert kept(call, block, x) == {F64: 7 * (6 + (20 if TABLE[name].gated else 10))}


@pytest.mark.parametrize("name", ["relu2", "gelu", "swiglu"])
def test_compiled_dropout_saves_only_a_seed_more(name: str) -> None:
    hidden = 20 if TABLE[name].gated else 10
    for save, elements in zip(SAVES[:2], (6 + hidden, 6), strict=True):
        block = build(name, 0.2, **save)
        assert kept(compiled(block), block, rows(7)) == {F64: 7 * elements, torch.int64: 1}


@pytest.mark.parametrize("name", ["relu2", "gelu", "swiglu"])
def test_compiled_chunks_keep_x_alone_per_token(name: str) -> None:
    block = build(name, 0.2, **SAVES[2])
    few, more = (kept(compiled(block, dynamic=False), block, rows(count)) for count in (7, 13))
    assert more.pop(F64) - few.pop(F64) == 6 * 6
    assert more == few


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_dropout_uses_one_mask_in_forward_and_backward(backend: str) -> None:
    block = FeedForward(64, 64, 0.5, activation="identity", bias=False)
    with torch.no_grad():
        block.up_proj.weight.copy_(torch.eye(64))
        block.down_proj.weight.copy_(torch.eye(64))
    call = compiled(block, backend)
    x = torch.ones(32, 64, requires_grad=True)
    y = call(x)
    assert set(y.unique().tolist()) == {0.0, 2.0}
    assert 0.4 < (y == 0.0).float().mean() < 0.6
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], y)
    torch.manual_seed(4)
    first, second = call(x), call(x)
    torch.manual_seed(4)
    assert torch.equal(call(x), first)
    assert not torch.equal(first, second)


def test_compiled_follows_train_and_eval_and_adapters() -> None:
    block, x = build("swiglu", 0.5), rows(7)
    call = compiled(block)
    assert not torch.equal(call(x), call(x))
    block.eval()
    torch.testing.assert_close(call(x), block(x))
    before = call(x)
    wrapped = nn.Sequential(block.down_proj, nn.Tanh())
    block.down_proj = wrapped  # an adapter added after compiling
    torch.testing.assert_close(call(x), before.tanh())
    block.down_proj = wrapped[0]
    block.up_proj.forward = lambda x: torch.zeros(7, 10, dtype=F64)
    torch.testing.assert_close(call(x), block.down_proj.bias.expand(7, 5))


def test_compiled_hooks_fire() -> None:
    block, x = build("swiglu"), rows(7)
    block.gate_proj.register_forward_hook(lambda module, args, y: 2.0 * y)
    assert_same(outcome(compiled(block), block, x), outcome(block, block, x))


def test_compiled_under_autocast() -> None:
    block, x = FeedForward(6, 10, activation="swiglu"), torch.randn(7, 6)
    results = []
    for call in (compiled(block), block):
        with torch.autocast("cpu", torch.bfloat16):
            y = call(x)
        assert y.dtype == torch.bfloat16
        results.append([y, *torch.autograd.grad(y.float().square().sum(), list(block.parameters()))])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)


def test_compiled_errors_keep_their_one_line() -> None:
    with pytest.raises(Exception, match=r"x must be \(\.\.\., 6\)"):
        compiled(build())(torch.randn(3, 7, dtype=F64))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", ["gelu", "swiglu"])
def test_traced_by_torchscript(name: str) -> None:
    block, x = FeedForward(16, 32, activation=name), torch.randn(3, 16)
    traced, other = torch.jit.trace(block, x), torch.randn(2, 5, 16)
    torch.testing.assert_close(traced(other), block(other))


@pytest.mark.parametrize("name", ["gelu", "relu2", "swiglu"])
@pytest.mark.parametrize("strict", [False, True], ids=["free", "strict"])
def test_export(name: str, strict: bool) -> None:
    x = rows(7).detach()
    for training in (False, True):
        block = build(name, 0.2 * training, out_dropout=0.2 * training).train(training)
        tokens = torch.export.Dim("tokens", min=2, max=1024)
        program = torch.export.export(block, (x,), dynamic_shapes=({0: tokens},), strict=strict)
        targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
        assert all(target.namespace == "aten" for target in targets)
        assert (
            sum(target.overloadpacket is torch.ops.aten.linear for target in targets) == 2 + TABLE[name].gated
        )
        if not training:
            torch.testing.assert_close(program.module()(x), block(x))
            more = rows(20)
            torch.testing.assert_close(program.module()(more), block(more))


@pytest.mark.parametrize("name", NAMES)
def test_per_sample_gradients(name: str) -> None:
    for save in SAVES:
        block, x = build(name, **save), rows(3).detach()
        parameters = dict(block.named_parameters())

        def loss(parameters: dict, row: Tensor, block=block) -> Tensor:
            return functional_call(block, parameters, (row,)).square().sum()

        per_sample = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
        for i in range(3):
            alone = torch.autograd.grad(block(x[i]).square().sum(), list(block.parameters()))
            for ours, theirs in zip(per_sample.values(), alone, strict=True):
                torch.testing.assert_close(ours[i], theirs)


@pytest.mark.parametrize("name", NAMES)
def test_vmap_and_both_modes_of_differentiation(name: str) -> None:
    block, x, t = build(name), rows(4).detach(), rows(4).detach()
    torch.testing.assert_close(vmap(block)(x), block(x))
    torch.testing.assert_close(vmap(block, in_dims=1)(x.view(4, 1, 6)), block(x).view(1, 4, 5))
    forwards, backwards = jacfwd(block)(x[0]), jacrev(block)(x[0])
    torch.testing.assert_close(forwards, backwards)
    value, tangent = jvp(block, (x,), (t,))
    torch.testing.assert_close(value, block(x))
    torch.testing.assert_close(tangent[0], forwards @ t[0])
    with forward_ad.dual_level():
        dual = block(forward_ad.make_dual(x, t))
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, tangent)


def test_hessian_is_double_backward() -> None:
    block, x = build("swiglu"), rows(1).detach()[0]
    ours = hessian(lambda x: block(x).square().sum())(x)
    theirs = torch.autograd.functional.hessian(lambda x: block(x).square().sum(), x)
    torch.testing.assert_close(ours, theirs)


def test_functional_call_uses_the_given_weights() -> None:
    block, x = build("swiglu"), rows(3)
    other = {name: torch.randn_like(p) for name, p in block.named_parameters()}
    twin = copy.deepcopy(block)
    twin.load_state_dict(other)
    torch.testing.assert_close(functional_call(block, other, (x,)), twin(x))
    wanted = {name: p.requires_grad_() for name, p in other.items()}
    grads = torch.autograd.grad(functional_call(block, wanted, (x,)).sum(), list(wanted.values()))
    assert_same(list(grads), list(torch.autograd.grad(twin(x).sum(), list(twin.parameters()))))


def test_an_ensemble_by_vmap() -> None:
    blocks, x = [build("geglu") for _ in range(3)], rows(4).detach()
    parameters, _ = stack_module_state(blocks)
    shell = copy.deepcopy(blocks[0]).to("meta")
    ys = vmap(lambda p, x: functional_call(shell, p, (x,)), in_dims=(0, None))(parameters, x)
    torch.testing.assert_close(ys, torch.stack([block(x) for block in blocks]))


def test_dropout_under_vmap() -> None:
    block, x = build("gelu", 0.5), torch.ones(8, 6, dtype=F64)
    different = vmap(block, randomness="different")(x)
    assert different.unique(dim=0).shape[0] > 1
    alike = vmap(block, randomness="same")(x)
    torch.testing.assert_close(alike, alike[:1].expand(8, 5))
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(block)(x)


def test_torch_func_within_the_compiler() -> None:
    block, x = build("swiglu"), rows(4).detach()
    torch.testing.assert_close(compiled(vmap(block))(x), block(x))
    torch.testing.assert_close(compiled(jacrev(block))(x[0]), jacrev(block)(x[0]))
    value, tangent = compiled(lambda x: jvp(block, (x,), (x,)))(x)
    torch.testing.assert_close((value, tangent), jvp(block, (x,), (x,)))
    y = compiled(vmap(lambda row: dropout(row, 0.5), randomness="different"))(torch.ones(8, 6))
    assert set(y.unique().tolist()) <= {0.0, 2.0}
