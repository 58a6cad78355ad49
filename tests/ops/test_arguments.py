"""What the op accepts, and what it refuses in one line."""

import math

import pytest
import torch

from ffn.ops import dispatch, feed_forward
from tests.ops.samples import F64, SAVES, Arguments, draw, gradients, leaf


@pytest.mark.parametrize("shape", [(), (1,), (0,), (3,), (2, 3, 4), (2, 0, 4), (0, 0)], ids=str)
@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_any_leading_shape(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for name in ("gelu", "swiglu"):
        for save in SAVES:
            arguments = draw(name, shape=shape, dtype=dtype)
            y = feed_forward(*arguments, activation=name, dropout=0.1, **save)
            assert y.shape == (*shape, 5)
            assert y.dtype == dtype
            for grad, argument in zip(
                gradients(y, arguments, torch.ones_like(y)), arguments.given(), strict=True
            ):
                assert grad.shape == argument.shape
                assert grad.isfinite().all()
            if 0 in shape:
                assert not any(grad.any() for grad in gradients(feed_forward(*arguments, activation=name),
                                                                arguments, torch.ones_like(y)))  # fmt: skip


def test_no_gradient_no_graph() -> None:
    arguments = draw("gelu")
    with torch.no_grad():
        assert feed_forward(*arguments, dropout=0.1).grad_fn is None
    assert feed_forward(*(None if t is None else t.detach() for t in arguments)).grad_fn is None
    with torch.inference_mode():
        assert feed_forward(*arguments).is_inference()


def test_callables_and_the_reference_backend() -> None:
    arguments = draw("gelu")
    y = feed_forward(*arguments, activation="gelu")
    torch.testing.assert_close(feed_forward(*arguments, activation="gelu", backend="reference"), y)
    torch.testing.assert_close(feed_forward(*arguments, activation=lambda x: torch.nn.functional.gelu(x)), y)
    torch.testing.assert_close(feed_forward(*arguments, activation=torch.nn.GELU()), y)
    for activation in ("gelu", torch.sin):
        torch.manual_seed(1)
        first = feed_forward(*arguments, activation=activation, dropout=0.5, backend="reference")
        torch.manual_seed(1)
        again = feed_forward(*arguments, activation=activation, dropout=0.5, backend="reference")
        assert torch.equal(first, again)
        assert not torch.equal(first, feed_forward(*arguments, activation=activation, backend="reference"))


REFUSED = [
    (lambda a: a._replace(x=a.x[:, :4]), ValueError,
     r"feed_forward\(activation='geglu'\) wants x \(..., 6\), gate \(10, 6\), up \(10, 6\), down \(5, 10\), "
     r"gate_bias \(10\), up_bias \(10\), down_bias \(5\); got x \(7, 4\), gate \(10, 6\), "),
    (lambda a: a._replace(x=a.x.sum()), ValueError, r"got x \(\), "),
    (lambda a: a._replace(down=a.down.t()), ValueError, r"down \(10, 10\).*got .*down \(10, 5\)"),
    (lambda a: a._replace(down=a.down[0]), ValueError, r"down \(O, 10\).*got .*down \(10\)"),
    (lambda a: a._replace(up=a.up[None]), ValueError, r"up \(H, D\).*got .*up \(1, 10, 6\)"),
    (lambda a: a._replace(gate=a.gate[:9]), ValueError, r"wants .*gate \(10, 6\).*got .*gate \(9, 6\)"),
    (lambda a: a._replace(gate=None), ValueError,
     r"wants .*gate \(10, 6\).*got x \(7, 6\), up.*; geglu is gated: give gate=$"),
    (lambda a: a._replace(up_bias=a.up_bias[:9]), ValueError, r"up_bias \(10\).*got .*up_bias \(9\)"),
    (lambda a: a._replace(gate_bias=a.gate_bias[None]), ValueError, r"got .*gate_bias \(1, 10\)"),
    (lambda a: a._replace(down_bias=a.up_bias), ValueError, r"down_bias \(5\).*got .*down_bias \(10\)"),
    (lambda a: a._replace(x=a.x.float()), TypeError,
     r"wants one floating dtype; got x float32, gate float64, .*; cast by \.to\(dtype\) or autocast"),
    (lambda a: a._replace(up_bias=a.up_bias.half()), TypeError, r"got .*up_bias float16"),
    (lambda a: a._replace(x=a.x.long()), TypeError, "got x int64"),
    (lambda a: a._replace(x=a.x.to("meta")), ValueError,
     r"wants one device; got x meta, gate cpu, .*; move one side with \.to\(device\)"),
    (lambda a: a._replace(down=a.down.to("meta")), ValueError, r"one device; got x cpu, .*down meta"),
    (lambda a: a._replace(x=None), TypeError, "^feed_forward: x is a NoneType; want a Tensor$"),
    (lambda a: a._replace(x=a.x.detach().numpy()), TypeError, "^feed_forward: x is a numpy.ndarray; want a"),
    (lambda a: a._replace(up=a.up.detach().numpy()), TypeError, "^feed_forward: up is a numpy.ndarray; want"),
    (lambda a: a._replace(down=None), TypeError, "^feed_forward: down is a NoneType; want a Tensor$"),
    (lambda a: a._replace(gate=torch.nn.Linear(6, 10)), TypeError, r"gate is a torch.*\.Linear; want a"),
    (lambda a: a._replace(up_bias=[0.0] * 10), TypeError, "^feed_forward: up_bias is a list; want a Tensor$"),
]  # fmt: skip


@pytest.mark.parametrize(("spoil", "error", "text"), REFUSED)
def test_what_does_not_fit_is_refused_in_one_line(spoil, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text) as caught:
        feed_forward(*spoil(draw("geglu")), activation="geglu")
    assert "\n" not in str(caught.value)


def test_a_gate_that_a_plain_block_has_no_use_for() -> None:
    with pytest.raises(
        ValueError,
        match=r"activation='gelu'\) wants x \(..., 6\), up .*; got x .*gate \(10, 6\), .*"
        "; gelu is not gated: leave gate and gate_bias out, or take one of glu, bilinear, reglu, geglu",
    ):
        feed_forward(*draw("geglu"), activation="gelu")


def test_a_gate_bias_that_a_plain_block_has_no_use_for() -> None:
    arguments = draw("gelu")
    text = (
        r"'gelu'\) wants x \(..., 6\), up .*, up_bias .*; got x .*gate_bias \(10\), .*leave gate_bias out, or"
    )
    with pytest.raises(ValueError, match=text):
        feed_forward(*arguments._replace(gate_bias=arguments.up_bias), activation="gelu")


def test_integers_are_refused_under_autocast_too() -> None:
    arguments = draw("gelu", dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match="got x int64, up float32"):
        feed_forward(*arguments._replace(x=arguments.x.long()))


OPTIONS = [
    ({"activation": "glue"}, "activation"),
    ({"dropout": 1.0}, r"dropout=1.0: want a probability in \[0, 1\)"),
    ({"dropout": -0.1}, r"dropout=-0.1: want a probability in \[0, 1\)"),
    ({"dropout": math.nan}, r"dropout=nan: want a probability"),
    ({"dropout": "0.1"}, r"dropout='0\.1': want a probability in \[0, 1\)$"),
    ({"save": "all"}, r"save='all': want one of preact, input"),
    ({"chunk_tokens": 4}, r"chunk_tokens=4 with save='preact': want save='input'$"),
    ({"chunk_tokens": 0, "save": "input"}, r"chunk_tokens=0: want a positive whole number"),
    ({"chunk_tokens": 2.5, "save": "input"}, r"chunk_tokens=2\.5: want a positive whole number"),
    ({"chunk_tokens": 8.0, "save": "input"}, r"chunk_tokens=8\.0: want a positive whole number"),
    ({"save": ["x"]}, r"save=\['x'\]: want one of preact, input"),
    ({"dropout": [0.1]}, r"dropout=\[0\.1\]: want a probability"),
    ({"backend": "cuda"}, r"backend='cuda': no such backend; choose one of auto, eager, triton, reference"),
    ({"backend": "triton"}, r"backend='triton' cannot run: .*; use 'auto' or 'eager'"),
]


@pytest.mark.parametrize(("options", "text"), OPTIONS)
def test_options_that_make_no_sense(options: dict, text: str) -> None:
    feed_forward(*draw("gelu"), chunk_tokens=8, save="input")  # known from here on, and 8.0 == 8
    with pytest.raises(ValueError, match=f"^{text}"):
        feed_forward(*draw("gelu"), **options)


def test_meta_tensors_pass_through() -> None:
    for name in ("relu2", "swiglu"):
        arguments = Arguments(*(None if t is None else leaf(t.detach().to("meta")) for t in draw(name)))
        y = feed_forward(*arguments, activation=name, dropout=0.1)
        assert y.is_meta
        assert y.shape == (7, 5)
        assert [g.shape for g in gradients(y, arguments, torch.ones_like(y))] == [
            t.shape for t in arguments.given()
        ]
    assert dispatch.choose("auto", arguments.x.device, arguments.x.dtype).backend == "eager"
