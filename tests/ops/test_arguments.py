"""Arguments of the op: fitting shapes and dtypes are accepted, others raise one line."""

import math

import pytest
import torch

from ffn import FeedForward
from ffn.ops import dispatch
from ffn.ops.feed_forward import feed_forward
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


def test_no_graph_without_gradients() -> None:
    arguments = draw("gelu")
    with torch.no_grad():
        assert feed_forward(*arguments, dropout=0.1).grad_fn is None
    assert feed_forward(*(None if t is None else t.detach() for t in arguments)).grad_fn is None
    with torch.inference_mode():
        assert feed_forward(*arguments).is_inference()


def test_callables_and_reference_backend() -> None:
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
    (lambda a: a._replace(x=a.x[:, :4]), ValueError, "x"),
    (lambda a: a._replace(x=a.x.sum()), ValueError, "x"),
    (lambda a: a._replace(down=a.down.t()), ValueError, "down"),
    (lambda a: a._replace(down=a.down[0]), ValueError, "down"),
    (lambda a: a._replace(up=a.up[None]), ValueError, "up"),
    (lambda a: a._replace(gate=a.gate[:9]), ValueError, "gate"),
    (lambda a: a._replace(gate=None), ValueError, "gate"),
    (lambda a: a._replace(gate=None, gate_bias=None), ValueError, "gate"),
    (lambda a: a._replace(up_bias=a.up_bias[:9]), ValueError, "up_bias"),
    (lambda a: a._replace(gate_bias=a.gate_bias[None]), ValueError, "gate_bias"),
    (lambda a: a._replace(down_bias=a.up_bias), ValueError, "down_bias"),
    (lambda a: a._replace(x=a.x.float()), TypeError, "gate"),
    (lambda a: a._replace(up_bias=a.up_bias.half()), TypeError, "up_bias"),
    (lambda a: a._replace(x=a.x.long()), TypeError, "x"),
    (lambda a: a._replace(x=a.x.to("meta")), ValueError, "gate"),
    (lambda a: a._replace(x=None), TypeError, "x"),
    (lambda a: a._replace(x=a.x.detach().numpy()), TypeError, "x"),
    (lambda a: a._replace(up=a.up.detach().numpy()), TypeError, "up"),
    (lambda a: a._replace(down=None), TypeError, "down"),
    (lambda a: a._replace(gate=torch.nn.Linear(6, 10)), TypeError, "gate"),
    (lambda a: a._replace(up_bias=[0.0] * 10), TypeError, "up_bias"),
]


@pytest.mark.parametrize(("spoil", "error", "name"), REFUSED)
def test_misfit_raises_one_line_naming_the_argument(spoil, error: type[Exception], name: str) -> None:
    with pytest.raises(error, match=rf"^{name} must be ") as caught:
        feed_forward(*spoil(draw("geglu")), activation="geglu")
    assert "\n" not in str(caught.value)


def test_plain_activation_with_a_gate_raises() -> None:
    with pytest.raises(ValueError, match=r"^gate must be None"):
        feed_forward(*draw("geglu"), activation="gelu")
    arguments = draw("gelu")
    with pytest.raises(ValueError, match=r"^gate_bias must be None"):
        feed_forward(*arguments._replace(gate_bias=arguments.up_bias), activation="gelu")


def test_integer_input_raises_under_autocast() -> None:
    arguments = draw("gelu", dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match=r"^x must be "):
        feed_forward(*arguments._replace(x=arguments.x.long()))


OPTIONS = [
    {"activation": "glue"},
    {"dropout": 1.0},
    {"dropout": -0.1},
    {"dropout": math.nan},
    {"dropout": "0.1"},
    {"dropout": [0.1]},
    {"chunk_tokens": 0, "save": "input"},
    {"chunk_tokens": 2.5, "save": "input"},
    {"chunk_tokens": 8.0, "save": "input"},
    {"save": "all"},
    {"save": ["x"]},
    {"save": "preact", "chunk_tokens": 4},
    {"backend": "cuda"},
    {"backend": "triton"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_wrong_option_raises_naming_it(options: dict) -> None:
    feed_forward(*draw("gelu"), chunk_tokens=8, save="input")  # cached from here on, and 8.0 == 8
    with pytest.raises(ValueError, match=f"^{next(iter(options))}"):
        feed_forward(*draw("gelu"), **options)


def test_meta_tensors() -> None:
    for name in ("relu2", "swiglu"):
        arguments = Arguments(*(None if t is None else leaf(t.detach().to("meta")) for t in draw(name)))
        y = feed_forward(*arguments, activation=name, dropout=0.1)
        assert y.is_meta
        assert y.shape == (7, 5)
        assert [g.shape for g in gradients(y, arguments, torch.ones_like(y))] == [
            t.shape for t in arguments.given()
        ]
    assert dispatch.choose("auto", arguments.x.device, arguments.x.dtype).backend == "eager"


def test_save_input_under_plain_autograd_raises() -> None:
    with pytest.raises(ValueError, match=r"^save must be"):
        FeedForward(4, activation=lambda v: v.sin(), save="input")
    with pytest.raises(ValueError, match=r"^save must be"):
        feed_forward(torch.ones(1, 2), torch.ones(3, 2), torch.ones(2, 3), save="input", backend="reference")
