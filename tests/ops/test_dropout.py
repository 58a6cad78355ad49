"""Dropout's mask, the function `dropout`, and dropout in the block."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ffn.nn import FeedForward
from ffn.ops.dropout import dropout
from ffn.ops.dropout_mask import drop_, noise, scale
from ffn.ops.feed_forward import feed_forward
from tests.kept import kept_for_backward
from tests.ops.masks import PROBABILITIES, applied, check_counts, dropped
from tests.ops.samples import F64, draw, gradients

DTYPES = [F64, torch.float32, torch.bfloat16, torch.float16]
SEED = torch.tensor([0])


@pytest.mark.parametrize("p", [*PROBABILITIES, 1e-9, 0.99999])
def test_scale_is_one_over_the_kept_share(p: float) -> None:
    share = 1.0 - min(applied(p), 65535 / 65536)
    assert scale(p) == 1.0 / share
    assert abs((1.0 - share) - p) <= 2.0**-17 or p > 65535 / 65536
    factors = noise(SEED, 300, 40, p, F64)
    assert set(factors.unique().tolist()) <= {0.0, 1.0 / share}
    for dtype in DTYPES:
        rounded = noise(SEED, 300, 40, p, dtype)
        assert torch.equal(rounded, factors.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_drop_in_place_equals_multiplying_by_noise(dtype: torch.dtype) -> None:
    a, b = torch.randn(50, 14, dtype=dtype), torch.randn(50, 30, dtype=dtype)[:, ::2][:, :14]
    expected = [t.double() * noise(SEED, 50, 14, 0.3, F64) for t in (a, b)]
    drop_((a, b), SEED, 0.3)
    for got, exact in zip((a, b), expected, strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=0.0)


def test_chunk_of_rows_has_its_part_of_the_whole_mask() -> None:
    rows, cols = 900, 401  # more than one block
    whole = dropped(rows, cols, 0.3)
    for start, stop in ((0, 1), (5, 6), (300, 900), (326, 328), (899, 900)):
        part = noise(SEED, stop - start, cols, 0.3, torch.float32, row_start=start) == 0.0
        assert torch.equal(part, whole[start:stop])
    for narrow in (1, 2, 3, 400):
        assert torch.equal(dropped(rows, narrow, 0.3), whole[:, :narrow])


def test_mask_of_smaller_p_is_a_subset_of_larger_p() -> None:
    few, many = dropped(200, 50, 0.2), dropped(200, 50, 0.6)
    assert (many | ~few).all()


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 1), (2, 3, 5), (0, 4), (4, 0)], ids=str)
def test_dropout_of_any_shape_has_one_mask_both_ways(shape: tuple[int, ...]) -> None:
    for dtype in DTYPES:
        x = torch.ones(shape, dtype=dtype, requires_grad=True)
        y = dropout(x, 0.5)
        assert y.shape == x.shape
        assert y.dtype == dtype
        (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
        assert torch.equal(grad, y)  # dy and x are ones, so both are the mask
        assert set(y.flatten().tolist()) <= {0.0, 2.0}


def test_dropout_follows_seed_p_and_training() -> None:
    x = torch.randn(40, 30)
    torch.manual_seed(3)
    first, second = dropout(x, 0.5), dropout(x, 0.5)
    torch.manual_seed(3)
    assert torch.equal(dropout(x, 0.5), first)
    assert torch.equal(dropout(x, 0.5), second)
    assert not torch.equal(first, second)
    assert dropout(x, 0.5, training=False) is x
    assert dropout(x, 0.0) is x
    for p in (1.0, -0.5, math.nan):
        with pytest.raises(ValueError, match=r"^p must be"):
            dropout(x, p)


def test_dropout_takes_any_strides_and_keeps_its_input() -> None:
    x = torch.randn(5, 8, 6).transpose(0, 2)
    before = x.clone()
    torch.manual_seed(3)
    y = dropout(x, 0.5)
    torch.manual_seed(3)
    assert torch.equal(y, dropout(x.contiguous(), 0.5))
    assert torch.equal(x, before)
    leaf = torch.randn(5, 8, requires_grad=True)
    dropout(leaf.t(), 0.5).sum().backward()  # its gradient is expanded and transposed
    assert set(leaf.grad.unique().tolist()) <= {0.0, 2.0}


def test_dropout_saves_eight_bytes() -> None:
    x = torch.randn(40, 30, requires_grad=True)
    assert kept_for_backward(lambda: dropout(x, 0.5), [x]) == {torch.int64: 1}


def test_dropout_gradcheck_and_gradgradcheck() -> None:
    def run(x: Tensor) -> Tensor:
        torch.manual_seed(0)
        return dropout(x, 0.4)

    x = torch.randn(3, 5, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(run, x)
    assert torch.autograd.gradgradcheck(run, x)
    assert torch.autograd.gradgradcheck(lambda x: run(x * x).square(), x)


def test_dropout_under_torch_func_and_for_subclasses_is_torchs() -> None:
    x = torch.ones(6, 5)
    y = torch.func.vmap(lambda row: dropout(row, 0.5), randomness="different")(x)
    assert set(y.unique().tolist()) <= {0.0, 2.0}
    same = torch.func.vmap(lambda row: dropout(row, 0.5), randomness="same")(x)
    assert torch.equal(same, same[:1].expand(6, 5))

    class Tagged(torch.Tensor):
        pass

    assert type(dropout(x.as_subclass(Tagged), 0.5)) is Tagged


def block(**options) -> FeedForward:
    return FeedForward(6, 20, 0.4, out_dropout=0.2, dtype=F64, **options)


SAVES = [{"save": "preact"}, {"save": "input"}, {"save": "input", "chunk_tokens": 4}]


def run(call, x: Tensor, module: nn.Module) -> list[Tensor]:
    torch.manual_seed(7)
    y = call(x)
    return [y, *torch.autograd.grad(y.square().sum(), [x, *module.parameters()])]


def same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_save_options_do_not_change_the_mask(activation: str) -> None:
    x = torch.randn(3, 5, 6, dtype=F64, requires_grad=True)
    blocks = [block(activation=activation, **save) for save in SAVES]
    for other in blocks[1:]:
        other.load_state_dict(blocks[0].state_dict())
    first, *others = [run(b, x, b) for b in blocks]
    for other in others:
        same(other, first)


def run_checkpointed(b: FeedForward, x: Tensor, use_reentrant: bool) -> list[Tensor]:
    b.zero_grad()
    x = x.detach().requires_grad_()
    torch.manual_seed(7)
    y = checkpoint(lambda t: b(t * 1.0), x, use_reentrant=use_reentrant)
    torch.rand(3)  # other draws between forward and backward
    y.square().sum().backward()
    return [y, x.grad, *(p.grad for p in b.parameters())]


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non_reentrant"])
def test_activation_checkpointing_repeats_the_mask(use_reentrant: bool) -> None:
    x = torch.randn(3, 5, 6, dtype=F64, requires_grad=True)
    for save in SAVES:
        b = block(activation="swiglu", **save)
        same(run_checkpointed(b, x, use_reentrant), run(b, x, b))


def test_no_dropout_in_eval() -> None:
    b = block().eval()
    plain = FeedForward(6, 20, dtype=F64)
    plain.load_state_dict(b.state_dict())
    x = torch.randn(4, 6, dtype=F64)
    assert torch.equal(b(x), plain(x))
    assert not torch.equal(b.train()(x), plain(x))


def test_out_dropout_drops_outputs() -> None:
    b = FeedForward(6, 20, out_dim=50, out_dropout=0.25)
    x = torch.randn(400, 6)
    y, whole = b(x), b.eval()(x)
    check_counts((y == 0.0).sum(), y.numel(), 0.25)
    torch.testing.assert_close(y[y != 0.0], whole[y != 0.0] / 0.75)
    (grad,) = torch.autograd.grad(y.sum(), b.down_proj.bias)
    torch.testing.assert_close(grad, (y != 0.0).sum(0) / 0.75)


def test_hidden_dropout_keeps_the_expectation() -> None:
    arguments = draw("gelu", shape=(1,))
    whole = feed_forward(*arguments)
    torch.manual_seed(0)
    tokens = arguments._replace(x=arguments.x.detach().expand(40_000, 6))
    ys = feed_forward(*tokens, dropout=0.3)
    deviation = (ys.mean(0) - whole[0]).abs() / (ys.std(0) / 200.0)
    assert deviation.max() < 5.5
    assert len(gradients(ys, tokens._replace(x=None), torch.ones_like(ys))) == 4
