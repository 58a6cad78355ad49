"""Dropout by its statistics, and its mask as the pure function of (seed, row, column) that it is.

The masks are drawn from fixed seeds, so a test passes always or never. The bound is one that truly random
masks would miss once in a million: Chernoff's, P(share of n as far off as q) <= 2 exp(-n KL(q || p)).
"""

import itertools
import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ffn.nn import FeedForward
from ffn.ops import dropout, feed_forward
from ffn.ops.dropout import _mix_, draw_seed, drop_, noise, scale
from tests.ops.samples import F64, draw, gradients

PROBABILITIES = [0.003, 0.1, 1 / 3, 0.5, 0.9]
DTYPES = [F64, torch.float32, torch.bfloat16, torch.float16]
CPU = torch.device("cpu")
probabilities = pytest.mark.parametrize("p", PROBABILITIES)


def seed(value: int = 0) -> Tensor:
    return torch.tensor([value])


def dropped(rows: int, cols: int, p: float, value: int = 0) -> Tensor:
    return noise(seed(value), rows, cols, p, torch.float32) == 0.0


def check_counts(counts: Tensor, n: int, p: float) -> None:
    """That all these counts may be those of n trials of probability p each."""
    q = counts.double() / n
    divergence = torch.xlogy(q, q / p) + torch.xlogy(1.0 - q, (1.0 - q) / (1.0 - p))
    assert n * divergence.max().item() <= math.log(2e6 * counts.numel())


def applied(p: float) -> float:
    """The probability that a 16-bit threshold can express."""
    return round(p * 65536) / 65536


def test_the_bound_notices() -> None:
    check_counts(torch.tensor([5000]), 10_000, 0.5)
    check_counts(torch.tensor([5260]), 10_000, 0.5)
    for wrong in (5300, 4700, 0, 10_000):
        with pytest.raises(AssertionError):
            check_counts(torch.tensor([wrong]), 10_000, 0.5)


@probabilities
def test_rate_overall_per_row_and_per_column(p: float) -> None:
    for value, (rows, cols) in itertools.product((0, -1, 2**40 + 7), ((1024, 513), (3000, 64))):
        mask = dropped(rows, cols, p, value)
        check_counts(mask.sum(), rows * cols, applied(p))
        check_counts(mask.sum(0), rows, applied(p))
        check_counts(mask.sum(1), cols, applied(p))


def test_rate_at_every_sixteenth() -> None:
    for step in range(1, 16):
        check_counts(dropped(512, 512, step / 16, value=step).sum(), 512 * 512, step / 16)


@pytest.mark.parametrize(("rows", "cols"), [(20_000, 1), (20_000, 3), (1, 20_001), (1, 1), (0, 5), (5, 0)])
def test_odd_and_narrow_widths(rows: int, cols: int) -> None:
    mask = dropped(rows, cols, 0.25)
    assert mask.shape == (rows, cols)
    if rows * cols > 1:
        check_counts(mask.sum(), rows * cols, 0.25)
        check_counts(mask.sum(0 if cols < 4 else 1), max(rows, cols), 0.25)


def check_independent(a: Tensor, b: Tensor, p: float) -> None:
    """Masks of equal shape, whose elements are to be independent: how often they agree, and both drop."""
    p = applied(p)
    check_counts((a == b).sum(), a.numel(), p**2 + (1.0 - p) ** 2)
    check_counts((a & b).sum(), a.numel(), p**2)


@probabilities
def test_neighbours_are_uncorrelated(p: float) -> None:
    """Elements some way apart, in disjoint pairs as the bound wants, are as pairs of independent ones."""
    mask = dropped(1024, 1024, p)
    for m in (mask, mask.t()):
        for distance in (1, 2, 3, 16, 128):
            pairs = m[: 1024 - 1024 % (2 * distance)].unflatten(0, (-1, 2, distance))
            check_independent(pairs[:, 0], pairs[:, 1], p)
        check_independent(
            m[1:-1:2], m[2::2], p
        )  # the other pairing of neighbours: an odd with the next even one
    check_independent(mask[::2, :-1], mask[1::2, 1:], p)  # diagonally


def test_four_corners_are_uncorrelated() -> None:
    """A word is mixed from a sum of a row's and a column's key: of no consequence for rectangles either."""
    mask = dropped(1024, 1024, 0.5)
    for distance in (1, 2, 8, 64):
        corners = mask.unflatten(1, (-1, 2, distance)).unflatten(0, (-1, 2, distance))
        parity = (
            corners[:, 0, :, :, 0] ^ corners[:, 0, :, :, 1] ^ corners[:, 1, :, :, 0] ^ corners[:, 1, :, :, 1]
        )
        check_counts(parity.sum(), parity.numel(), 0.5)


def test_every_bit_of_a_word_reaches_every_bit_of_its_mixture() -> None:
    """Strict avalanche: whichever input bit flips, each output bit flips half the time."""
    words = torch.randint(-(2**31), 2**31, (1 << 14,)).to(torch.int32)
    mixed, bits = _mix_(words.clone()), torch.arange(32, dtype=torch.int32)
    for bit in (1 << torch.arange(32)).to(torch.int32):
        flips = (mixed ^ _mix_(words ^ bit))[:, None] >> bits & 1
        assert (flips.double().mean(0) - 0.5).abs().max() < 0.03


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_counts_scatter_as_binomial_ones_do(p: float) -> None:
    mask, n = dropped(1024, 1024, p).double(), 1024
    p = applied(p)
    for axis in (0, 1):
        chi2 = (mask.sum(axis) - n * p).square().sum().item() / (n * p * (1.0 - p))
        assert abs(chi2 - n) < 5.5 * math.sqrt(2.0 * n)  # chi-square of 1024 degrees: nearly normal


def test_any_two_rows_and_any_two_columns_are_uncorrelated() -> None:
    mask = dropped(512, 512, 0.5)
    for m in (mask, mask.t()):
        signs = 1.0 - 2.0 * m.float()
        first, second = torch.triu_indices(512, 512, offset=1)
        agree = (512 + (signs @ signs.t())[first, second]) / 2
        check_counts(agree, 512, 0.5)


@probabilities
def test_seeds_are_independent(p: float) -> None:
    masks = [dropped(512, 512, p, value) for value in (0, 1, 2, -1, 2**32, 2**63 - 1, -(2**63), 12345)]
    for a, b in itertools.combinations(masks, 2):
        check_independent(a, b, p)
        check_independent(a[1:], b[:-1], p)
        check_independent(a[:, 2:], b[:, :-2], p)


def test_drawn_seeds_differ_and_follow_torchs_generator() -> None:
    torch.manual_seed(1)
    first = torch.cat([draw_seed(CPU) for _ in range(100)])
    torch.manual_seed(1)
    assert torch.equal(first, torch.cat([draw_seed(CPU) for _ in range(100)]))
    assert first.unique().numel() == 100
    check_counts((first > 0).sum(), 100, 0.5)


@pytest.mark.parametrize("p", [*PROBABILITIES, 1e-9, 0.99999])
def test_scale_is_one_over_the_share_that_is_kept(p: float) -> None:
    share = 1.0 - min(applied(p), 65535 / 65536)
    assert scale(p) == 1.0 / share
    assert abs((1.0 - share) - p) <= 2.0**-17 or p > 65535 / 65536
    factors = noise(seed(), 300, 40, p, F64)
    assert set(factors.unique().tolist()) <= {0.0, 1.0 / share}
    for dtype in DTYPES:
        rounded = noise(seed(), 300, 40, p, dtype)
        assert torch.equal(rounded, factors.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropping_in_place_is_multiplying_with_the_noise(dtype: torch.dtype) -> None:
    a, b = torch.randn(50, 14, dtype=dtype), torch.randn(50, 30, dtype=dtype)[:, ::2][:, :14]
    expected = [t.double() * noise(seed(), 50, 14, 0.3, F64) for t in (a, b)]
    drop_((a, b), seed(), 0.3)
    for got, exact in zip((a, b), expected, strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=0.0)


def test_a_chunk_of_rows_has_the_mask_it_has_within_the_whole() -> None:
    rows, cols = 900, 401  # more than one block of the walk
    whole = dropped(rows, cols, 0.3)
    for start, stop in ((0, 1), (5, 6), (300, 900), (326, 328), (899, 900)):
        part = noise(seed(), stop - start, cols, 0.3, torch.float32, row_start=start) == 0.0
        assert torch.equal(part, whole[start:stop])
    for narrow in (1, 2, 3, 400):
        assert torch.equal(dropped(rows, narrow, 0.3), whole[:, :narrow])


def test_less_is_dropped_from_what_more_is_dropped_from() -> None:
    few, many = dropped(200, 50, 0.2), dropped(200, 50, 0.6)
    assert (many | ~few).all()


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 1), (2, 3, 5), (0, 4), (4, 0)], ids=str)
def test_the_function_over_any_shape(shape: tuple[int, ...]) -> None:
    for dtype in DTYPES:
        x = torch.ones(shape, dtype=dtype, requires_grad=True)
        y = dropout(x, 0.5)
        assert y.shape == x.shape
        assert y.dtype == dtype
        (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
        assert torch.equal(grad, y)  # of ones: the mask itself, so backward's is forward's
        assert set(y.flatten().tolist()) <= {0.0, 2.0}


def test_the_function_follows_the_seed_and_its_switch() -> None:
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
        with pytest.raises(ValueError, match=r"p=.*: want a probability in \[0, 1\)"):
            dropout(x, p)


def test_the_function_takes_any_strides_and_leaves_its_input_alone() -> None:
    x = torch.randn(5, 8, 6).transpose(0, 2)
    before = x.clone()
    torch.manual_seed(3)
    y = dropout(x, 0.5)
    torch.manual_seed(3)
    assert torch.equal(y, dropout(x.contiguous(), 0.5))
    assert torch.equal(x, before)
    leaf = torch.randn(5, 8, requires_grad=True)
    dropout(leaf.t(), 0.5).sum().backward()  # whose gradient is expanded and transposed
    assert set(leaf.grad.unique().tolist()) <= {0.0, 2.0}


def test_the_function_saves_eight_bytes() -> None:
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        dropout(torch.randn(40, 30, requires_grad=True), 0.5)
    assert [(t.numel(), t.dtype) for t in saved] == [(1, torch.int64)]


def test_the_function_is_differentiable_twice() -> None:
    def run(x: Tensor) -> Tensor:
        torch.manual_seed(0)
        return dropout(x, 0.4)

    x = torch.randn(3, 5, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(run, x)
    assert torch.autograd.gradgradcheck(run, x)
    assert torch.autograd.gradgradcheck(lambda x: run(x * x).square(), x)


def test_under_torch_func_and_for_subclasses_it_is_torchs_own() -> None:
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
def test_how_it_is_saved_does_not_change_the_mask(activation: str) -> None:
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


def test_off_in_eval() -> None:
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
