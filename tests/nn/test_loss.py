"""The chunked loss equals torch's cross entropy and its gradients, and saves only the gradients."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from ffn.nn import loss as loss_module
from ffn.nn.loss import linear_cross_entropy
from tests.kept import kept_for_backward

F64 = torch.float64


def case(tokens: int, dim: int, vocab: int, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(tokens, dim, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocab, dim, dtype=dtype, requires_grad=True)
    return hidden, weight, torch.randint(vocab, (tokens,))


def plain(hidden: Tensor, weight: Tensor, targets: Tensor, **options) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight), targets, **options)


@given(
    tokens=st.integers(1, 9),
    dim=st.integers(1, 4),
    vocab=st.integers(1, 7),
    chunk=st.integers(1, 9),
    smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    ignored=st.lists(st.integers(0, 8), max_size=9),
    seed=st.integers(0, 1000),
)
def test_loss_equals_torchs(tokens, dim, vocab, chunk, smoothing, ignored, seed) -> None:
    torch.manual_seed(seed)
    hidden, weight, targets = case(tokens, dim, vocab)
    targets[[i for i in ignored if i < tokens]] = -7
    options = {"ignore_index": -7, "label_smoothing": smoothing}
    ours = linear_cross_entropy(hidden, weight, targets, chunk_tokens=chunk, **options)
    theirs = plain(hidden, weight, targets, **options)
    torch.testing.assert_close(ours, theirs, equal_nan=True)
    if (targets != -7).any():
        scale = torch.tensor(3.0, dtype=F64)
        torch.testing.assert_close(
            torch.autograd.grad(ours, (hidden, weight), scale),
            torch.autograd.grad(theirs, (hidden, weight), scale),
        )


def test_leading_shape_and_a_second_backward() -> None:
    hidden, weight, targets = case(12, 4, 5)
    loss = linear_cross_entropy(hidden.view(3, 4, 4), weight, targets.view(3, 4), chunk_tokens=5)
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, (hidden, weight)), first)


def test_only_wanted_gradients_are_computed() -> None:
    hidden, weight, targets = case(6, 4, 5)
    expected = torch.autograd.grad(plain(hidden, weight, targets), (hidden, weight))
    for frozen, other, grad in ((hidden, weight, expected[1]), (weight, hidden, expected[0])):
        frozen.requires_grad_(False).grad = None
        linear_cross_entropy(hidden, weight, targets, chunk_tokens=4).backward()
        torch.testing.assert_close(other.grad, grad)
        assert frozen.grad is None
        frozen.requires_grad_()
    with torch.no_grad():
        quiet = linear_cross_entropy(hidden, weight, targets, chunk_tokens=4)
    assert not quiet.requires_grad
    torch.testing.assert_close(quiet, plain(hidden, weight, targets).detach())


def test_gradcheck_passes_and_a_second_derivative_raises() -> None:
    hidden, weight, targets = case(5, 3, 4)
    function = lambda h, w: linear_cross_entropy(h, w, targets, label_smoothing=0.1, chunk_tokens=2)  # noqa: E731
    assert torch.autograd.gradcheck(function, (hidden, weight))
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(function(hidden, weight), hidden, create_graph=True)


def test_bytes_saved_for_backward() -> None:
    N, D, V = 96, 8, 500
    inputs = case(N, D, V, torch.float32)
    ours = kept_for_backward(lambda: linear_cross_entropy(*inputs, chunk_tokens=16), inputs)
    assert ours == {torch.float32: N * D + V * D + 1}  # both gradients, and one over the number of targets
    theirs = kept_for_backward(lambda: plain(*inputs), inputs)
    assert theirs[torch.float32] >= N * V
    small = kept_for_backward(lambda: linear_cross_entropy(*inputs), inputs)
    assert small == theirs  # a single chunk runs torch's loss


def test_no_tensor_is_larger_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    N, D, V = 64, 4, 300
    monkeypatch.setattr(loss_module, "LOGITS_PER_CHUNK", 8 * V)
    hidden, weight, targets = case(N, D, V, torch.float32)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for t in torch.utils._pytree.tree_leaves(out):
                if isinstance(t, Tensor):
                    largest = max(largest, t.untyped_storage().nbytes() // t.element_size())
            return out

    with Watch():
        linear_cross_entropy(hidden, weight, targets).backward()
    assert largest == 8 * V


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision(dtype: torch.dtype, autocast: bool) -> None:
    hidden, weight, targets = case(40, 16, 50, torch.float32 if autocast else dtype)
    exact_inputs = [t.detach().to(dtype).double().requires_grad_() for t in (hidden, weight)]
    exact = plain(*exact_inputs, targets)
    with torch.autocast("cpu", dtype, enabled=autocast):
        ours = linear_cross_entropy(hidden, weight, targets, chunk_tokens=7)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), exact, atol=5e-3, rtol=5e-3)
    for grad, t, reference in zip(
        torch.autograd.grad(ours, (hidden, weight)),
        (hidden, weight),
        torch.autograd.grad(exact, exact_inputs),
        strict=True,
    ):
        assert grad.dtype == t.dtype
        torch.testing.assert_close(grad.double(), reference, atol=2e-3, rtol=2e-2)


def test_float16_gradients_do_not_vanish_in_the_mean() -> None:
    hidden, weight, targets = case(2048, 4, 6, torch.float16)
    scaler = 2.0**14
    (linear_cross_entropy(hidden, weight, targets, chunk_tokens=256) * scaler).backward()
    wide = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    (plain(*wide, targets) * scaler).backward()
    assert hidden.grad is not None
    error = (hidden.grad.double() - wide[0].grad).norm() / wide[0].grad.norm()
    assert error < 5e-3


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # raised inside the compiler
def test_compiles_into_one_graph() -> None:
    hidden, weight, targets = case(10, 4, 6)
    targets[2] = -100
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    for chunk in (None, 4):
        ours = compiled(hidden, weight, targets, label_smoothing=0.1, chunk_tokens=chunk)
        theirs = plain(hidden, weight, targets, label_smoothing=0.1)
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(
            torch.autograd.grad(ours, (hidden, weight)), torch.autograd.grad(theirs, (hidden, weight))
        )


def test_torch_func() -> None:
    hidden, weight, targets = case(6, 4, 5)
    hidden, weight = hidden.detach(), weight.detach()
    ours = torch.func.grad(lambda w: linear_cross_entropy(hidden, w, targets, chunk_tokens=4))(weight)
    theirs = torch.func.grad(lambda w: plain(hidden, w, targets))(weight)
    torch.testing.assert_close(ours, theirs)


def test_shapes_that_do_not_fit_raise() -> None:
    hidden, weight, targets = case(6, 4, 5)
    with pytest.raises(ValueError, match=r"^hidden, weight and targets .* \(6, 4\), .* \(5, 4\), .* \(5,\)$"):
        linear_cross_entropy(hidden, weight, targets[1:])


@pytest.mark.parametrize("chunk", [None, 4])
def test_dtype_rules_are_the_same_with_and_without_chunks(chunk: int | None) -> None:
    hidden, weight, targets = case(6, 4, 5, torch.float32)
    half, wide = hidden.bfloat16(), weight.double()
    for other in ((half, weight), (hidden, wide)):
        with pytest.raises(TypeError, match=r"^hidden and weight must have the same dtype"):
            linear_cross_entropy(*other, targets, chunk_tokens=chunk)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = linear_cross_entropy(half, weight, targets, chunk_tokens=chunk)
        with pytest.raises(TypeError, match=r"^hidden and weight must have the same dtype"):
            linear_cross_entropy(hidden, wide, targets, chunk_tokens=chunk)
    torch.testing.assert_close(mixed, plain(hidden, weight, targets), atol=0.05, rtol=0.05)
    for dtype in (torch.int32, torch.uint8):
        short = linear_cross_entropy(hidden, weight, targets.to(dtype), chunk_tokens=chunk)
        torch.testing.assert_close(short, plain(hidden, weight, targets))
    with pytest.raises(TypeError, match=r"^targets must be "):
        linear_cross_entropy(hidden, weight, targets.float(), chunk_tokens=chunk)


@pytest.mark.parametrize("chunk", [None, 2])
def test_values_out_of_range_raise_with_and_without_chunks(chunk: int | None) -> None:
    hidden, weight, targets = case(6, 4, 5)
    for smoothing in (-0.1, 2.0, float("nan")):
        with pytest.raises(ValueError, match=f"^label_smoothing .*got {smoothing}$"):
            linear_cross_entropy(hidden, weight, targets, label_smoothing=smoothing, chunk_tokens=chunk)
    targets[:2] = torch.tensor([-100, 3])
    for wrong in (5, -1):
        targets[-1] = wrong
        with pytest.raises(ValueError, match=f"^targets .*got {wrong}$"):
            linear_cross_entropy(hidden, weight, targets, chunk_tokens=chunk)


@pytest.mark.parametrize("chunk", [0, -3])
def test_chunks_without_tokens_raise(chunk: int) -> None:
    with pytest.raises(ValueError, match=f"^chunk_tokens .*got {chunk}$"):
        linear_cross_entropy(*case(6, 4, 5), chunk_tokens=chunk)


@pytest.mark.parametrize("chunk", [2, 50])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("frozen", [(), (0, 1), (2,)], ids=str)
def test_bias_and_softcap_equal_torchs(chunk: int, softcap: float | None, frozen: tuple) -> None:
    hidden, weight, targets = case(7, 3, 5)
    bias = torch.randn(5, dtype=F64, requires_grad=True)
    inputs = [t.requires_grad_(i not in frozen) for i, t in enumerate((hidden, weight, bias))]
    targets[2] = -100
    options = {"bias": bias, "softcap": softcap, "label_smoothing": 0.1, "chunk_tokens": chunk}
    ours = linear_cross_entropy(hidden, weight, targets, **options)
    logits = F.linear(hidden, weight, bias)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    theirs = F.cross_entropy(logits, targets, label_smoothing=0.1)
    torch.testing.assert_close(ours, theirs)
    wanted = [t for t in inputs if t.requires_grad]
    torch.testing.assert_close(torch.autograd.grad(ours, wanted), torch.autograd.grad(theirs, wanted))


def test_bias_that_does_not_fit_raises() -> None:
    hidden, weight, targets = case(7, 3, 5)
    with pytest.raises(ValueError, match=r"^bias .*5.*got \(4,\)$"):
        linear_cross_entropy(hidden, weight, targets, bias=torch.zeros(4, dtype=F64))
