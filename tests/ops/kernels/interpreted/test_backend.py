"""`feed_forward` with backend "triton" in the interpreter: outputs, gradients, and paths of the rule."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from ffn import FeedForward
from ffn.activations import TABLE
from ffn.ops import dispatch
from ffn.ops.dropout_mask import draw_seed
from ffn.ops.feed_forward import feed_forward
from ffn.ops.kernels import decode, tilings
from tests.ops.samples import F64, NAMES, Arguments, by_reference, draw, gradients

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FUSED = tilings.Tiling(16, 64, 16, 2, 2, 4, 2)


def factors(arguments: Arguments, p: float) -> torch.Tensor | None:
    """Return the factors that the next call draws if it starts from the same seed."""
    if p == 0.0:
        return None
    rows, H = arguments.x.numel() // arguments.x.shape[-1], arguments.up.shape[0]
    noise = dispatch.module("triton").noise(draw_seed(arguments.x.device), rows, H, p, torch.float32)
    return noise.view(*arguments.x.shape[:-1], H)


def results(run, arguments: Arguments, dy: torch.Tensor) -> list[torch.Tensor]:
    y = run(*arguments)
    wanted = [t for t in arguments.given() if t.requires_grad]
    return [y, *torch.autograd.grad(y, wanted, dy.to(y.dtype))]


def check(name: str, dtype: torch.dtype, p: float, **options) -> None:
    check_on(draw(name, shape=(2, 18), widths=(24, 40, 16), dtype=dtype), name, p, **options)


def check_on(arguments: Arguments, name: str, p: float, **options) -> None:
    check_together([arguments], name, p, **options)


def check_together(calls: list[Arguments], name: str, p: float, **options) -> None:
    """Assert a largest error over all calls of at most twice plain torch's, plus one ulp of the maximum."""
    dtype = calls[0].x.dtype
    for found in zip(*(compared(arguments, name, p, options) for arguments in calls), strict=True):
        errors, allowed, values = zip(*found, strict=True)
        assert max(errors) <= 2 * max(allowed) + torch.finfo(dtype).eps * max(values)


def compared(arguments: Arguments, name: str, p: float, options: dict) -> list[tuple[float, float, float]]:
    """Return (our largest error, plain torch's, the largest value) for the output and each gradient."""
    dtype, frozen = arguments.x.dtype, [t is not None and not t.requires_grad for t in arguments]
    dy = torch.randn(*arguments.x.shape[:-1], arguments.down.shape[0]).to(dtype)
    torch.manual_seed(5)
    noise = factors(arguments, p)
    torch.manual_seed(5)
    run = {"activation": name, "dropout": p, "backend": "triton", **options}
    ours = results(lambda *a: feed_forward(*a, **run), arguments, dy)
    by_the_book = {"activation": TABLE[name]}
    low = None if noise is None else noise.to(dtype)
    plain = results(lambda *a: by_reference(*a, **by_the_book, noise=low), arguments, dy)
    wide, exactly = None if noise is None else noise.double(), arguments.to(F64)
    for t, still in zip(exactly, frozen, strict=True):
        if still:
            t.requires_grad_(False)
    exact = results(lambda *a: by_reference(*a, **by_the_book, noise=wide), exactly, dy)
    assert all(got.dtype == dtype for got in ours)
    return [
        tuple(t.abs().max().item() for t in (got.double() - oracle, theirs.double() - oracle, oracle))
        for got, theirs, oracle in zip(ours, plain, exact, strict=True)
        if oracle.numel() > 0
    ]


def with_tokens(arguments: Arguments, index: int) -> Arguments:
    """Return the same weights with one of the tokens."""
    x = arguments.x
    return arguments._replace(x=x.detach()[index : index + 1].requires_grad_(x.requires_grad))


def apart(t: torch.Tensor) -> torch.Tensor:
    """Return a strided leaf with the same values."""
    return torch.stack([t.detach(), t.detach()], -1)[..., 0].requires_grad_()


@given(st.data())
@settings(max_examples=60)
def test_any_block(data: st.DataObject) -> None:
    choose = data.draw
    torch.manual_seed(choose(st.integers(0, 2**31)))
    name, dtype = (
        choose(st.sampled_from(NAMES)),
        choose(st.sampled_from(DTYPES)),
    )
    arguments = draw(
        name,
        bias=choose(st.booleans()),
        shape=choose(st.sampled_from([(0,), (8,), (7,), (2, 18), (33,)])),  # the 8 tokens run one by one
        widths=choose(st.sampled_from([(24, 40, 16), (16, 32, 16), (7, 21, 5)])),
        dtype=dtype,
    )
    if choose(st.booleans()):
        arguments = Arguments(*(None if t is None else apart(t) for t in arguments))
    some_frozen = st.sets(st.integers(0, len(arguments.given()) - 1), max_size=len(arguments.given()) - 1)
    for index in choose(some_frozen):
        arguments.given()[index].requires_grad_(False)
    options = choose(st.sampled_from([{}, {"save": "input"}, {"save": "input", "chunk_tokens": 5}]))
    fused = choose(st.booleans())
    with pytest.MonkeyPatch.context() as patch:
        if fused:
            patch.setattr(tilings, "choose", lambda *case: FUSED)
        # One token's largest error is too random, so eight one-token calls are judged together.
        tokens = arguments.x.shape[0]
        calls = [with_tokens(arguments, i) for i in range(8)] if tokens == 8 else [arguments]
        check_together(calls, name, choose(st.sampled_from([0.0, 0.3])), **options)


@pytest.mark.parametrize("name", NAMES)
def test_every_activation(name: str) -> None:
    check(name, torch.float32, 0.0)


CHUNKED = {"save": "input", "chunk_tokens": 20}


@pytest.mark.parametrize("name", ["gelu", "swiglu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"save": "input"}, CHUNKED], ids=["preact", "input", "chunks"])
def test_dropout_with_each_save_option(name: str, dtype: torch.dtype, options: dict) -> None:
    check(name, dtype, 0.3, **options)


@pytest.mark.parametrize("name", ["gelu", "swiglu"])
def test_fused_products(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    asked = []
    monkeypatch.setattr(tilings, "choose", lambda *case: asked.append(case) or FUSED)
    check(name, torch.bfloat16, 0.3)
    assert {(forward, gated) for forward, _, _, gated, *_ in asked} == {
        (forward, TABLE[name].gated) for forward in (True, False)
    }


@pytest.mark.parametrize("fused", [False, True], ids=["decode", "fused"])
def test_strided_biases(monkeypatch: pytest.MonkeyPatch, fused: bool) -> None:
    decoded, op = [], decode.op
    monkeypatch.setattr(decode, "op", lambda *given: decoded.append(given) or op(*given))
    if fused:
        monkeypatch.setattr(tilings, "choose", lambda *case: FUSED)
    tokens = 5 if fused else 1  # the most that `decode` takes in float32
    arguments = draw("geglu", shape=(tokens,), widths=(24, 40, 16), dtype=torch.float32)
    strided = [
        torch.stack([b.detach(), b.detach() + 1], -1)[..., 0]
        for b in (arguments.up_bias, arguments.gate_bias)
    ]
    arguments = arguments._replace(up_bias=strided[0], gate_bias=strided[1])
    with torch.set_grad_enabled(fused):
        y = feed_forward(*arguments, activation="geglu", backend="triton")
        torch.testing.assert_close(y, by_reference(*arguments, activation=TABLE["geglu"]))
    assert len(decoded) == (not fused)


def test_zero_tokens_and_one() -> None:
    for tokens in (0, 1):
        arguments = draw("swiglu", shape=(tokens,), widths=(24, 40, 16), dtype=torch.float32)
        y = feed_forward(*arguments, activation="swiglu", backend="triton")
        torch.testing.assert_close(y, by_reference(*arguments, activation=TABLE["swiglu"]))
        assert all(torch.isfinite(grad).all() for grad in gradients(y, arguments, torch.randn(tokens, 16)))


def test_double_backward_has_the_mask_of_forward() -> None:
    arguments = draw("gelu", shape=(5,), widths=(8, 16, 8), dtype=torch.float32)
    torch.manual_seed(2)
    y = feed_forward(*arguments, activation="gelu", dropout=0.4, backend="triton")
    dy = torch.randn(5, 8)
    once = torch.autograd.grad(y, arguments.given(), dy, retain_graph=True)
    twice = torch.autograd.grad(y, arguments.given(), dy, create_graph=True)
    torch.testing.assert_close(twice, once)
    assert all(grad.requires_grad for grad in twice[:-1])  # down_bias's gradient is the sum of dy, a constant


def test_triton_under_torch_compile_raises() -> None:
    block, x = FeedForward(24, 40, backend="triton"), torch.randn(2, 24)
    with pytest.raises(Exception, match=r"backend must be 'auto'.*torch\.compile"):
        torch.compile(block, backend="eager", fullgraph=True)(x)


def test_explain_and_errors_of_backend_triton() -> None:
    block = FeedForward(24, 40, backend="triton")
    assert block.explain(torch.randn(2, 24)).startswith("triton: ")
    with pytest.raises(ValueError, match=r"^backend must be"):
        FeedForward(24, 40, backend="triton", dtype=F64)(torch.randn(2, 24, dtype=F64))
    block, x = FeedForward(24, 40, backend="triton"), torch.randn(2, 24)
    for call in (block, block.explain):
        with pytest.raises(ValueError, match=r"^backend must be"):
            torch.func.vmap(lambda x, call=call: call(x))(x)


def test_transposed_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights stored as in GPT-2: few tokens copy no weight, and gradients have the weights' layout."""
    arguments = draw("gelu", shape=(5,), widths=(24, 40, 16), dtype=torch.bfloat16)
    turned = {name: getattr(arguments, name).detach().t().contiguous().t() for name in ("up", "down")}
    arguments = arguments._replace(**{name: t.requires_grad_() for name, t in turned.items()})
    y = feed_forward(*arguments, activation="gelu", backend="triton")
    grads = torch.autograd.grad(y, (arguments.up, arguments.down), torch.randn_like(y))
    assert all(grad.stride() == t.stride() for grad, t in zip(grads, turned.values(), strict=True))
    monkeypatch.setattr(decode, "op", None)
    with torch.no_grad():
        assert torch.equal(feed_forward(*arguments, activation="gelu", backend="triton"), y)


def test_decode_in_float32_is_for_one_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "op", None)
    arguments = draw("gelu", shape=(2,), widths=(24, 40, 16), dtype=torch.float32)
    with torch.no_grad():
        feed_forward(*arguments, activation="gelu", backend="triton")
        with pytest.raises(TypeError):
            feed_forward(*arguments._replace(x=arguments.x[:1]), activation="gelu", backend="triton")


@pytest.mark.parametrize("name", ["gelu", "swiglu"])
@pytest.mark.parametrize("choose", [lambda *case: FUSED, lambda *case: None], ids=["fused", "apart"])
def test_flop_counter_sees_every_matmul(monkeypatch: pytest.MonkeyPatch, name: str, choose) -> None:
    monkeypatch.setattr(tilings, "choose", choose)
    arguments = draw(name, shape=(18,), widths=(24, 40, 16), dtype=torch.bfloat16)
    forward = 2 * 18 * sum(w.numel() for w in arguments.given()[1:] if w.ndim == 2)
    dispatch.module("triton")  # the counter only knows ops registered before it
    with FlopCounterMode(display=False) as counter:
        y = feed_forward(*arguments, activation=name, backend="triton")
        gradients(y, arguments, torch.ones_like(y))
    assert counter.get_total_flops() == 3 * forward
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        feed_forward(*arguments, activation=name, backend="triton")
    assert counter.get_total_flops() == forward


def test_fake_tensors() -> None:
    with FakeTensorMode():
        arguments = draw("swiglu", shape=(18,), widths=(24, 40, 16), dtype=torch.bfloat16)
        y = feed_forward(*arguments, activation="swiglu", dropout=0.1, backend="triton")
        found = gradients(y, arguments, torch.ones_like(y))
    assert [t.shape for t in (y, *found)] == [(18, 16), *(t.shape for t in arguments.given())]
