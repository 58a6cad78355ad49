"""The table: every slope is the derivative of its value; every name means exactly one row."""

import copy
import math
from dataclasses import dataclass
from functools import partial
from types import FunctionType, SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ffn.activations import ALIASES, FUNCTIONS, GATES, PLAIN, TABLE, Activation, resolve
from tests.ops import textbook

F64 = torch.float64
HALF = [torch.bfloat16, torch.float16]
# Both tails, both sides of every threshold, and the middle; another test covers the kink at 0.
POINTS = torch.cat([torch.linspace(-40.0, 40.0, 400, dtype=F64), torch.linspace(-3.0, 3.0, 400, dtype=F64)])
# torch's softplus is x beyond its threshold of 20, where the formula still adds log(1 + exp(-20)).
SOFTPLUS = math.log1p(math.exp(-20.0))
rows = pytest.mark.parametrize("row", TABLE.values(), ids=list(TABLE))
plain = pytest.mark.parametrize("row", PLAIN, ids=[row.name for row in PLAIN])


def tolerance(row: Activation) -> float:
    return 1.01 * SOFTPLUS if row.forward is F.softplus else 1e-12


def test_table_holds_every_row_and_gated_rows_use_the_formula_of_their_gate() -> None:
    names = "identity relu leaky_relu relu2 gelu gelu_tanh quick_gelu silu sigmoid tanh mish softplus"
    assert {row.name for row in PLAIN} == set(names.split())
    assert set(GATES) == {"glu", "bilinear", "reglu", "geglu", "geglu_tanh", "swiglu"}
    assert all(name == row.name for name, row in TABLE.items())
    assert {name for name, row in TABLE.items() if row.gated} == set(GATES)
    for name, gate in GATES.items():
        assert TABLE[name].formula is TABLE[gate].formula


@rows
def test_slope_is_the_derivative_of_the_value(row: Activation) -> None:
    x = POINTS.clone().requires_grad_()
    value, slope = row.formula(x)
    (by_autograd,) = torch.autograd.grad(value.sum(), x)
    torch.testing.assert_close(slope, by_autograd, rtol=1e-12, atol=1e-12)
    assert value.dtype == slope.dtype == x.dtype
    assert value.shape == slope.shape == x.shape


@pytest.mark.parametrize("row", [row for row in PLAIN if row.forward], ids=lambda row: row.name)
def test_value_and_slope_equal_torchs(row: Activation) -> None:
    x = POINTS.clone().requires_grad_()
    value, slope = row.formula(x)
    torchs = row.forward(x)
    torch.testing.assert_close(value, torchs, rtol=1e-12, atol=tolerance(row))
    torch.testing.assert_close(
        slope, torch.autograd.grad(torchs.sum(), x)[0], rtol=1e-12, atol=tolerance(row)
    )


@rows
def test_value_and_slope_equal_the_numpy_oracle(row: Activation) -> None:
    value, slope = row.formula(POINTS)
    f, df = textbook.ACTIVATIONS[GATES.get(row.name, row.name)]
    np.testing.assert_allclose(value.numpy(), f(POINTS.numpy()), rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(slope.numpy(), df(POINTS.numpy()), rtol=1e-12, atol=1e-13)


@rows
def test_calling_a_row_gives_the_differentiable_value(row: Activation) -> None:
    x = POINTS.clone().requires_grad_()
    value, slope = row.formula(x)
    torch.testing.assert_close(row(x), value, rtol=1e-12, atol=tolerance(row))
    (grad,) = torch.autograd.grad(row(x).sum(), x)
    torch.testing.assert_close(grad, slope, rtol=1e-12, atol=tolerance(row))


@rows
def test_grad_is_dvalue_times_slope_even_in_place(row: Activation) -> None:
    dvalue = torch.randn_like(POINTS)
    _, slope = row.formula(POINTS)
    for place in ("apart", "dvalue", "x"):
        given, x = dvalue.clone(), POINTS.clone()
        out = {"apart": torch.empty_like(x), "dvalue": given, "x": x}[place]
        assert row.grad(given, x, out=out) is out
        torch.testing.assert_close(out, dvalue * slope, atol=1e-8, rtol=1e-12)


@pytest.mark.parametrize(("name", "slope"), [("relu", 0.0), ("relu2", 0.0), ("leaky_relu", 0.01)])
def test_slope_at_a_kink_is_the_left_one_as_in_torch(name: str, slope: float) -> None:
    zero = torch.zeros(1, dtype=F64, requires_grad=True)
    row = TABLE[name]
    assert row.formula(zero)[1] == slope
    assert torch.autograd.grad(row(zero), zero)[0] == slope
    one = torch.ones(1, dtype=F64)
    assert row.grad(one, zero.detach(), out=one) == slope


@plain
@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
def test_low_precision_is_the_rounded_value(row: Activation, dtype: torch.dtype) -> None:
    x = POINTS.to(dtype)
    value, slope = row.formula(x.double())
    dvalue = torch.randn_like(x)
    assert row(x).dtype == dtype
    assert row.grad(dvalue, x, out=torch.empty_like(x)).dtype == dtype
    # Half precision is float32 rounded once; float32 rounds intermediates, which lie within [0, 2].
    ulps = 4.0 if dtype == torch.float32 else 0.51
    room = {"rtol": ulps * torch.finfo(dtype).eps, "atol": 1e-6 + tolerance(row)}
    torch.testing.assert_close(row(x).double(), value, **room)
    found = row.grad(dvalue, x, out=torch.empty_like(x))
    torch.testing.assert_close(found.double(), dvalue.double() * slope, **room)


@plain
@pytest.mark.parametrize("dtype", [*HALF, torch.float32, F64])
def test_value_and_slope_stay_finite_far_from_zero(row: Activation, dtype: torch.dtype) -> None:
    far = torch.tensor([-6e4, -1e3, -100.0, 100.0, 1e3, 6e4], dtype=dtype)
    far = far.clamp(-200.0, 200.0) if row.name == "relu2" else far  # its square overflows float16
    assert row(far).isfinite().all()
    assert row.grad(torch.ones_like(far), far, out=torch.empty_like(far)).isfinite().all()
    wide = far if dtype == F64 else far.float()  # kernels and eager rows compute halves in float32
    assert all(part.isfinite().all() for part in row.formula(wide))


@plain
def test_nan_in_is_nan_out(row: Activation) -> None:
    nan = torch.tensor([torch.nan])
    assert row(nan).isnan()
    assert row.formula(nan)[0].isnan()


@rows
def test_formulas_use_only_the_six_allowed_functions(row: Activation) -> None:
    names = set(row.formula.__code__.co_names) - {"m"}
    assert names <= {"exp", "erf", "log", "sigmoid", "abs", "where"}
    assert all(callable(getattr(torch, name)) for name in names)
    assert row.formula.__code__.co_freevars == ()
    assert row.formula.__defaults__ is None


@rows
def test_formulas_run_in_numpy(row: Activation) -> None:
    numpy = SimpleNamespace(
        exp=np.exp, erf=textbook.erf, log=np.log, sigmoid=textbook.logistic, abs=np.abs, where=np.where
    )
    read = FunctionType(row.formula.__code__, {"m": numpy}, row.name)
    for ours, theirs in zip(row.formula(POINTS), read(POINTS.numpy()), strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-12, atol=1e-13)


def test_names_resolve_to_their_rows() -> None:
    for name, row in TABLE.items():
        assert resolve(name) is row
        assert resolve(row) is row
        assert resolve(copy.copy(row)) == row
    for alias, name in ALIASES.items():
        assert resolve(alias) is TABLE[name]
    assert resolve("gelu_new") is resolve("gelu_pytorch_tanh") is TABLE["gelu_tanh"]
    assert resolve("swish") is TABLE["silu"]
    assert resolve("gelu") is not resolve("gelu_tanh")
    assert not set(ALIASES) & set(TABLE)


MODULES = [
    (nn.ReLU, "relu"), (nn.GELU, "gelu"), (nn.SiLU, "silu"), (nn.Sigmoid, "sigmoid"), (nn.Tanh, "tanh"),
    (nn.Mish, "mish"), (nn.Softplus, "softplus"), (nn.Identity, "identity"), (nn.LeakyReLU, "leaky_relu"),
]  # fmt: skip
INSTANCES = [
    (nn.GELU("tanh"), "gelu_tanh"),
    (nn.ReLU(inplace=True), "relu"),
    (nn.LeakyReLU(0.01), "leaky_relu"),
]


@pytest.mark.parametrize(
    ("given", "name"), [*MODULES, *((kind(), name) for kind, name in MODULES), *INSTANCES]
)
def test_torch_modules_resolve_to_the_row_that_computes_the_same(given, name: str) -> None:
    assert resolve(given) is TABLE[name]
    module = given() if isinstance(given, type) else given
    torch.testing.assert_close(TABLE[name](POINTS), module(POINTS.clone()))


@pytest.mark.parametrize(("function", "name"), FUNCTIONS.items())
def test_torch_functions_resolve_to_the_row_that_computes_the_same(function, name: str) -> None:
    assert resolve(function) is TABLE[name]
    torch.testing.assert_close(TABLE[name](POINTS), function(POINTS.clone()))


class Squash(nn.Tanh):
    def forward(self, x: Tensor) -> Tensor:
        return 2.0 * super().forward(x)


class SharpGELU(nn.GELU):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(3.0 * x)


@dataclass  # defines equality, so that its instances cannot be hashed
class Power:
    exponent: int

    def __call__(self, x: Tensor) -> Tensor:
        return x**self.exponent


OTHERS = [
    nn.LeakyReLU(0.2), nn.Softplus(beta=2), nn.Softplus(threshold=5), nn.ELU(), nn.PReLU(), nn.ReLU6(),
    Squash(), SharpGELU(), lambda x: x.sin(), torch.sin, partial(F.leaky_relu, negative_slope=0.3), Power(3),
]  # fmt: skip


@pytest.mark.parametrize("given", OTHERS, ids=lambda given: getattr(given, "__name__", type(given).__name__))
def test_other_callables_run_unchanged(given) -> None:
    row = resolve(given)
    assert row.formula is None
    assert not row.gated
    x = torch.randn(5)
    torch.testing.assert_close(row(x), given(x))


def test_a_class_without_a_row_is_instantiated() -> None:
    row = resolve(nn.ELU)
    assert row.formula is None
    assert isinstance(row.forward, nn.ELU)


def test_a_foreign_row_with_a_table_name_keeps_its_own_formula() -> None:
    mine = resolve(Activation("gelu", lambda x: (x * x, 2.0 * x)))
    assert mine.formula is None
    x = torch.randn(5, requires_grad=True)
    torch.testing.assert_close(mine(x), x * x)
    torch.testing.assert_close(torch.autograd.grad(mine(x).sum(), x)[0], 2.0 * x)


def test_invalid_activations_raise() -> None:
    for name, near in (("glue", "glu"), ("SwiGLU", "swiglu"), ("GELU", "gelu"), ("gelu_pytorch", "gelu_py")):
        with pytest.raises(ValueError, match=rf"^activation .*got '{name}'; did you mean {near}"):
            resolve(name)
    with pytest.raises(ValueError, match=r"^activation .*got 'xyz'$"):
        resolve("xyz")
    # an array is named by its type, not printed
    for given, shown in ((torch.zeros(9), "Tensor"), (np.zeros(9), "ndarray"), (3, "3"), (None, "None")):
        with pytest.raises(TypeError, match=rf"^activation .*got {shown}$"):
            resolve(given)
