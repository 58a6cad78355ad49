"""Laws of the block over shapes, dtypes, activations, strides and backends that hypothesis draws."""

import math
from dataclasses import dataclass

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ffn.activations import GATES, PLAIN, TABLE
from ffn.ops.feed_forward import feed_forward
from tests.ops.samples import F64, SAVES, Arguments, draw, gradients, leaf

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
seeds = st.integers(0, 2**31)
widths = st.integers(1, 12)


@dataclass(frozen=True)
class Case:
    """A call: its tensors and its options."""

    arguments: Arguments
    options: dict

    def __call__(self, arguments: Arguments | None = None, **changes) -> Tensor:
        return feed_forward(*(arguments or self.arguments), **{**self.options, **changes})

    @property
    def tolerance(self) -> dict[str, float]:
        """Allow another order of summation: some ulps of values of order one to ten."""
        eps = torch.finfo(self.arguments.x.dtype).eps
        return {"rtol": 16 * eps, "atol": 64 * eps}

    def __repr__(self) -> str:
        shapes = {field: tuple(t.shape) for field, t in self.arguments._asdict().items() if t is not None}
        return f"{self.options} {self.arguments.x.dtype} {shapes}"


@st.composite
def cases(draw_, names=tuple(TABLE), dtypes=DTYPES, min_tokens: int = 0, dropout: bool = False) -> Case:
    name, dtype = draw_(st.sampled_from(names)), draw_(st.sampled_from(dtypes))
    tokens, D, H, out = draw_(st.tuples(st.integers(min_tokens, 9), widths, widths, widths))
    torch.manual_seed(draw_(seeds))
    arguments = draw(name, bias=draw_(st.booleans()), shape=(tokens,), widths=(D, H, out), dtype=dtype)
    options = {
        "activation": name,
        **draw_(
            st.sampled_from([{"backend": "reference"}, *({"backend": "eager", **save} for save in SAVES)])
        ),
    }
    if dropout:
        options |= {"dropout": draw_(st.sampled_from([0.0, 0.1, 0.5, 0.99])), "backend": "eager"}
    return Case(arguments, options)


def all_gradients(
    case: Case, arguments: Arguments | None = None, dy: Tensor | None = None, **changes
) -> list[Tensor]:
    arguments = arguments or case.arguments
    torch.manual_seed(9)
    y = case(arguments, **changes)
    return [y, *gradients(y, arguments, torch.ones_like(y) if dy is None else dy)]


def assert_close(ours: list[Tensor], theirs: list[Tensor], case: Case) -> None:
    for a, b in zip(ours, theirs, strict=True):
        scale = max(1.0, b.abs().max().item()) if b.numel() else 1.0
        torch.testing.assert_close(a, b, rtol=0.0, atol=scale * case.tolerance["atol"])


@given(cases(dropout=True))
def test_dtype_and_shape_in_are_dtype_and_shape_out(case: Case) -> None:
    x, down = case.arguments.x, case.arguments.down
    y, *grads = all_gradients(case)
    assert y.shape == (x.shape[0], down.shape[0])
    assert y.dtype == x.dtype
    assert y.is_contiguous()
    for t, grad in zip(case.arguments.given(), grads, strict=True):
        assert (grad.shape, grad.dtype, grad.device) == (t.shape, t.dtype, t.device)


@given(cases(), seeds)
def test_permuting_tokens_permutes_outputs(case: Case, seed: int) -> None:
    x = case.arguments.x
    order = torch.randperm(x.shape[0], generator=torch.Generator().manual_seed(seed))
    permuted = case.arguments._replace(x=leaf(x.detach()[order]))
    dy = torch.randn(x.shape[0], case.arguments.down.shape[0], dtype=x.dtype)
    y, dx, *dweights = all_gradients(case, dy=dy)
    assert_close(all_gradients(case, permuted, dy=dy[order]), [y[order], dx[order], *dweights], case)


@given(cases(min_tokens=1), st.data())
def test_a_row_alone_is_that_row_in_a_batch(case: Case, data) -> None:
    x = case.arguments.x
    row = data.draw(st.integers(0, x.shape[0] - 1))
    y, dx, *_ = all_gradients(case)
    alone = case.arguments._replace(x=leaf(x.detach()[row].clone()))
    y_row, dx_row, *_ = all_gradients(case, alone)
    assert_close([y_row, dx_row], [y[row], dx[row]], case)


@given(cases(dropout=True))
def test_leading_shape_is_only_a_view(case: Case) -> None:
    x = case.arguments.x
    flat = all_gradients(case)
    folded = case.arguments._replace(x=leaf(x.detach()[None, :, None]))
    found = all_gradients(case, folded)
    found[:2] = [t.view_as(like) for t, like in zip(found, flat[:2], strict=False)]
    for ours, theirs in zip(found, flat, strict=True):
        assert torch.equal(ours, theirs)


@given(cases(), seeds)
def test_permuting_hidden_units_changes_nothing(case: Case, seed: int) -> None:
    a = case.arguments
    order = torch.randperm(a.up.shape[0], generator=torch.Generator().manual_seed(seed))

    def take(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.detach()[order]

    permuted = Arguments(
        a.x,
        take(a.up),
        a.down.detach()[:, order],
        take(a.gate),
        take(a.up_bias),
        a.down_bias,
        take(a.gate_bias),
    )
    assert_close([case(permuted)], [case()], case)


@given(cases(dropout=True), st.sampled_from(["sliced", "columns", "expanded"]))
def test_strided_is_contiguous(case: Case, kind: str) -> None:
    x = case.arguments.x.detach()
    strided = {
        "sliced": torch.stack([x, x], -1).flatten(-2)[:, ::2],
        "columns": x.t().contiguous().t(),
        "expanded": x[:1].expand(x.shape),
    }[kind]
    contiguous = strided.clone(memory_format=torch.contiguous_format)
    dy = torch.randn(case.arguments.down.shape[0], x.shape[0], dtype=x.dtype)
    ours = all_gradients(case, case.arguments._replace(x=leaf(strided.detach())), dy=dy.t())
    theirs = all_gradients(case, case.arguments._replace(x=leaf(contiguous)), dy=dy.t().contiguous())
    assert_close(ours, theirs, case)


@given(cases(dropout=True))
def test_save_mode_changes_nothing(case: Case) -> None:
    first, *others = (all_gradients(case, **{"chunk_tokens": None, **save}) for save in SAVES)
    for other in others:
        assert_close(other, first, case)


@given(cases(), seeds)
def test_splitting_a_batch_splits_outputs_and_adds_gradients(case: Case, seed: int) -> None:
    x = case.arguments.x.detach()
    cut = seed % (x.shape[0] + 1)
    parts = [all_gradients(case, case.arguments._replace(x=leaf(part))) for part in (x[:cut], x[cut:])]
    y, dx, *dweights = all_gradients(case)
    (y_a, dx_a, *dweights_a), (y_b, dx_b, *dweights_b) = parts
    added = [a + b for a, b in zip(dweights_a, dweights_b, strict=True)]
    assert_close([torch.cat([y_a, y_b]), torch.cat([dx_a, dx_b]), *added], [y, dx, *dweights], case)


@given(cases(dropout=True), st.floats(-4.0, 4.0))
def test_gradients_are_linear_in_dy(case: Case, factor: float) -> None:
    case = Case(case.arguments.to(F64), case.options)
    y, *grads = all_gradients(case)
    _, *scaled = all_gradients(case, dy=torch.full_like(y, factor))
    assert_close(scaled, [factor * grad for grad in grads], case)


@given(cases(dtypes=[F64], dropout=True), st.floats(-4.0, 4.0))
def test_the_output_is_linear_in_down(case: Case, factor: float) -> None:
    a = case.arguments
    torch.manual_seed(9)
    y = case()
    torch.manual_seed(9)
    bias = None if a.down_bias is None else factor * a.down_bias
    scaled = case(a._replace(down=factor * a.down, down_bias=bias))
    assert_close([scaled], [factor * y], case)


def without_biases(a: Arguments) -> Arguments:
    return a._replace(up_bias=None, down_bias=None, gate_bias=None)


@given(cases(names=("bilinear",), dtypes=[F64]), st.floats(-4.0, 4.0), seeds)
def test_bilinear_is_linear_in_each_of_gate_and_up(case: Case, factor: float, seed: int) -> None:
    a = without_biases(case.arguments)
    other = torch.randn(a.up.shape, dtype=F64, generator=torch.Generator().manual_seed(seed))
    y = case(a)
    for field in ("gate", "up"):
        weight = getattr(a, field)
        sum_of_two = case(a._replace(**{field: factor * weight + other}))
        assert_close([sum_of_two], [factor * y + case(a._replace(**{field: other}))], case)
    assert_close([case(a._replace(gate=a.up, up=a.gate))], [y], case)  # and symmetric
    assert_close([case(a._replace(x=factor * a.x))], [factor**2 * y], case)


@given(cases(names=tuple(GATES), dtypes=[F64]), st.floats(-4.0, 4.0))
def test_every_gated_form_is_linear_in_up(case: Case, factor: float) -> None:
    a = case.arguments._replace(down_bias=None)
    bias = None if a.up_bias is None else factor * a.up_bias
    assert_close([case(a._replace(up=factor * a.up, up_bias=bias))], [factor * case(a)], case)


@given(cases(names=tuple(GATES), dtypes=[F64]))
def test_a_gated_form_with_a_constant_up_is_the_plain_one(case: Case) -> None:
    a = case.arguments
    ones = torch.ones(a.up.shape[0], dtype=F64)
    gated = case(a._replace(up=torch.zeros_like(a.up), up_bias=ones))
    gate = GATES[case.options["activation"]]
    plain = case(a._replace(up=a.gate, up_bias=a.gate_bias, gate=None, gate_bias=None), activation=gate)
    assert_close([gated], [plain], case)


@given(cases(names=("relu", "leaky_relu", "reglu", "relu2", "identity"), dtypes=[F64]), st.floats(0.0, 4.0))
def test_homogeneous_activations_scale(case: Case, factor: float) -> None:
    a = without_biases(case.arguments)
    power = 2 if case.options["activation"] in ("relu2", "reglu") else 1
    assert_close([case(a._replace(x=factor * a.x))], [factor**power * case(a)], case)


@given(cases(names=("identity",), dtypes=[F64]))
def test_identity_is_one_affine_map(case: Case) -> None:
    x, up, down, _, up_bias, down_bias, _ = case.arguments
    offset = (0.0 if up_bias is None else down @ up_bias) + (0.0 if down_bias is None else down_bias)
    assert_close([case()], [x @ (down @ up).t() + offset], case)


@given(cases(names=tuple(row.name for row in PLAIN), dtypes=[F64]))
def test_hidden_units_add_up(case: Case) -> None:
    a = case.arguments
    units = []
    for i in range(a.up.shape[0]):
        bias = None if a.up_bias is None else a.up_bias[i : i + 1]
        units.append(
            case(a._replace(up=a.up[i : i + 1], down=a.down[:, i : i + 1], up_bias=bias, down_bias=None))
        )
    total = sum(units) + (0.0 if a.down_bias is None else a.down_bias)
    assert_close([case()], [total], case)


@given(cases(dropout=True))
def test_backward_twice_gives_the_same(case: Case) -> None:
    y = case()
    dy = torch.randn_like(y)
    first = torch.autograd.grad(y, case.arguments.given(), dy, retain_graph=True)
    again = torch.autograd.grad(y, case.arguments.given(), dy)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@given(cases(dropout=True))
def test_same_seed_gives_the_same_results(case: Case) -> None:
    first, again = all_gradients(case), all_gradients(case)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@given(cases(min_tokens=1, dropout=True), st.data())
def test_a_nan_stays_in_its_row(case: Case, data) -> None:
    x = case.arguments.x.detach().clone()
    row = data.draw(st.integers(0, x.shape[0] - 1))
    x[row] = math.nan
    torch.manual_seed(9)
    y = case(case.arguments._replace(x=x))
    others = torch.arange(x.shape[0]) != row
    assert y[others].isfinite().all()
    if not case.options.get("dropout"):
        assert y[row].isnan().all()


@given(cases(dtypes=[torch.float32, torch.bfloat16, torch.float16]))
def test_low_precision_is_near_float64(case: Case) -> None:
    wide = Case(case.arguments.to(F64), case.options)
    eps = torch.finfo(case.arguments.x.dtype).eps
    for got, exact in zip(all_gradients(case), all_gradients(wide), strict=True):
        scale = max(1.0, exact.abs().max().item()) if exact.numel() else 1.0
        assert got.numel() == 0 or (got.double() - exact).abs().max() <= 32 * scale * eps
