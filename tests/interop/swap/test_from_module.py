"""from_module: a FeedForward with the outputs, weights, dropout rates and mode of another block."""

import copy
import doctest
import importlib
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ffn
from ffn.interop.swap.from_module import from_module
from tests.interop.swap.blocks import ODD_WEIGHTS, Gated, Plain, rows, swapped
from tests.interop.swap.same import assert_same, outcome


class NanoGPT(nn.Module):
    def __init__(self, p: float, bias: bool = True):
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(6, 10, bias=bias), nn.Linear(10, 6, bias=bias)
        self.gelu, self.dropout = nn.GELU(), nn.Dropout(p)

    def forward(self, x):
        x = self.c_fc(x)
        x = self.gelu(x)
        x = self.c_proj(x)
        x = self.dropout(x)
        return x  # noqa: RET504


class Halves(nn.Module):
    """The last product is the first layer of a child."""

    def __init__(self, p: float):
        super().__init__()
        self.first, self.second = nn.Sequential(nn.Linear(6, 10), nn.ReLU()), Second(p)

    def forward(self, x):
        return self.second(self.first(x))


class Second(nn.Module):
    def __init__(self, p: float):
        super().__init__()
        self.dense, self.p = nn.Linear(10, 6), p

    def forward(self, h):
        h = self.dense(h)
        return F.dropout(h, self.p, self.training)


def sequential(p: float) -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 10), nn.GELU("tanh"), nn.Dropout(p), nn.Linear(10, 5), nn.Dropout(p / 2)
    )


def mixed_biases(p: float) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 10), nn.SiLU(), nn.Dropout(p), nn.Linear(10, 6, bias=False))


def of_transformers(family: str, name: str, p: float) -> nn.Module:
    kind = getattr(pytest.importorskip(f"transformers.models.{family}.modeling_{family}"), name)
    config = SimpleNamespace(hidden_size=6, intermediate_size=10, resid_pdrop=p, mlp_bias=True)
    config.hidden_act, config.activation_function = "silu", "gelu_new"
    return kind(10, config) if family == "gpt2" else kind(config)


def of_timm(name: str, p: float) -> nn.Module:
    return getattr(pytest.importorskip("timm.layers.mlp"), name)(6, 20, drop=(p, p / 2))


def transposed(t: Tensor) -> Tensor:
    return t.t()


def first_half(t: Tensor) -> Tensor:
    return t.chunk(2)[0]


def second_half(t: Tensor) -> Tensor:
    return t.chunk(2)[1]


def linears(**names: str) -> dict:
    """Return {our parameter: (their parameter, None)} for weights and biases of the same layout."""
    kinds = ("weight", "bias")
    return {f"{ours}.{kind}": (f"{theirs}.{kind}", None) for ours, theirs in names.items() for kind in kinds}


GATED = linears(gate_proj="gate_proj", up_proj="up_proj", down_proj="down_proj")
CONV1D = linears(up_proj="c_fc", down_proj="c_proj")
CONV1D |= {ours: (theirs, transposed) for ours, (theirs, _) in CONV1D.items() if "weight" in ours}
PHI3 = {
    "gate_proj.weight": ("gate_up_proj.weight", first_half),
    "up_proj.weight": ("gate_up_proj.weight", second_half),
    "down_proj.weight": ("down_proj.weight", None),
}
LAST = {
    "gate_proj.weight": ("fc1.weight", second_half),
    "gate_proj.bias": ("fc1.bias", second_half),
    "up_proj.weight": ("fc1.weight", first_half),
    "up_proj.bias": ("fc1.bias", first_half),
    **linears(down_proj="fc2"),
}
MIXED = linears(up_proj="0", down_proj="3")
del MIXED["down_proj.bias"]

# name: (build(p), activation, dropout / p, out_dropout / p, {our parameter: (theirs, function of layout)})
BLOCKS: dict[str, tuple[Callable[[float], nn.Module], str, float, float, dict]] = {
    "Sequential": (sequential, "gelu_tanh", 1.0, 0.5, linears(up_proj="0", down_proj="3")),
    "one bias": (mixed_biases, "silu", 1.0, 0.0, MIXED),
    "nanoGPT": (NanoGPT, "gelu", 0.0, 1.0, linears(up_proj="c_fc", down_proj="c_proj")),
    "a rate": (Plain, "gelu", 1.0, 0.0, linears(up_proj="fc1", down_proj="fc2")),
    "halves": (Halves, "relu", 0.0, 1.0, linears(up_proj="first.0", down_proj="second.dense")),
    "LlamaMLP": (lambda p: of_transformers("llama", "LlamaMLP", p), "swiglu", 0.0, 0.0, GATED),
    "GPT2MLP": (lambda p: of_transformers("gpt2", "GPT2MLP", p), "gelu_tanh", 0.0, 1.0, CONV1D),
    "Phi3MLP": (lambda p: of_transformers("phi3", "Phi3MLP", p), "swiglu", 0.0, 0.0, PHI3),
    "timm Mlp": (lambda p: of_timm("Mlp", p), "gelu", 1.0, 0.5, linears(up_proj="fc1", down_proj="fc2")),
    "timm GluMlp": (lambda p: of_timm("GluMlp", p), "glu", 1.0, 0.5, LAST),
}
blocks = pytest.mark.parametrize("name", BLOCKS)


def build(name: str, p: float = 0.0) -> nn.Module:
    return BLOCKS[name][0](p).double()


@blocks
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_outputs_and_all_gradients_are_equal_in_eval_mode(name: str, p: float) -> None:
    module, parameters = build(name, p).eval(), BLOCKS[name][4]
    block = from_module(module)
    assert not block.training
    assert block.activation == BLOCKS[name][1]
    theirs, ours = outcome(module, rows()), outcome(block, rows())
    expected = {"y": theirs["y"], "x": theirs["x"]}
    for parameter in dict(block.named_parameters()):
        key, part = parameters[parameter]
        expected[parameter] = theirs[key] if part is None else part(theirs[key])
    assert set(expected) == {"y", "x", *parameters}
    assert_same(ours, expected)


@blocks
def test_rates_and_training_mode_are_carried_over(name: str) -> None:
    _, _, inner, outer, _ = BLOCKS[name]
    for training in (True, False):
        block = from_module(build(name, 0.4).train(training))
        assert (block.dropout, block.out_dropout) == (0.4 * inner, 0.4 * outer)
        assert all(part.training == training for part in block.modules())
    block = from_module(build(name))
    assert (block.dropout, block.out_dropout) == (0.0, 0.0)


@blocks
def test_parameters_of_the_same_layout_are_shared_and_others_copied(name: str) -> None:
    module = build(name)
    block, theirs = from_module(module), dict(module.named_parameters())
    for ours, p in block.named_parameters():
        key, part = BLOCKS[name][4][ours]
        assert type(p) is nn.Parameter
        assert p.is_contiguous()
        assert (p is theirs[key]) == (part is None)
        if part is not None:
            assert torch.equal(p, part(theirs[key]))
            assert p.untyped_storage().data_ptr() != theirs[key].untyped_storage().data_ptr()


@blocks
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_and_frozen_weights_are_carried_over(name: str, dtype: torch.dtype) -> None:
    module = build(name).to(dtype)
    frozen, _ = next(module.named_parameters())
    module.get_parameter(frozen).requires_grad_(False)
    with torch.no_grad():
        block = from_module(module)
    for ours, p in block.named_parameters():
        assert p.dtype == dtype
        assert p.requires_grad == (BLOCKS[name][4][ours][0] != frozen)


@blocks
def test_the_module_and_the_random_state_are_left_alone(name: str) -> None:
    module = build(name, 0.4)
    attributes = [(type(m), copy.copy(vars(m))) for m in module.modules()]
    weights, state = copy.deepcopy(module.state_dict()), torch.get_rng_state()
    from_module(module)
    assert torch.equal(torch.get_rng_state(), state)
    for m, (cls, before) in zip(module.modules(), attributes, strict=True):
        assert type(m) is cls
        assert vars(m).keys() == before.keys()
        assert all(vars(m)[key] is value for key, value in before.items())
    assert all(torch.equal(value, weights[key]) for key, value in module.state_dict().items())
    assert all(p.grad is None for p in module.parameters())


def test_a_default_device_does_not_matter() -> None:
    module = sequential(0.4).double()
    with torch.device("meta"):
        block = from_module(module)
    assert not any(p.is_meta for p in block.parameters())


def test_tied_weights_stay_tied() -> None:
    module = of_transformers("llama", "LlamaMLP", 0.0)
    module.up_proj.weight = module.gate_proj.weight
    block = from_module(module)
    assert block.gate_proj is not None
    assert block.up_proj.weight is block.gate_proj.weight


def test_an_optimizer_goes_on_with_shared_weights() -> None:
    old = nn.Sequential(NanoGPT(0.0).double())
    new = copy.deepcopy(old)
    optimizers = [torch.optim.AdamW(model.parameters(), 0.01) for model in (old, new)]
    for converted in (False, True):
        if converted:
            new[0] = from_module(new[0])
        for model, optimizer in zip((old, new), optimizers, strict=True):
            for _ in range(2):
                optimizer.zero_grad()
                model(rows()).square().sum().backward()
                optimizer.step()
    assert_same({"y": new(rows())}, {"y": old(rows())}, 1e-9)


def test_blocks_of_a_model_can_be_replaced_one_by_one() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
    ids = {"bos_token_id": 1, "eos_token_id": 2}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **ids)).double().eval()
    tokens = torch.arange(12).view(2, 6)
    expected = model(tokens).logits
    for layer in model.transformer.h:
        layer.mlp = from_module(layer.mlp)
    assert_same({"logits": model(tokens).logits}, {"logits": expected}, 1e-11)


def test_a_feed_forward_is_returned_as_it_is() -> None:
    block = ffn.FeedForward(6, 10)
    assert from_module(block) is block


class Residual(NanoGPT):
    def forward(self, x):
        return x + self.c_proj(self.gelu(self.c_fc(x)))


class Multiplied(NanoGPT):
    """Multiplies the output by a parameter with the value one."""

    def __init__(self):
        super().__init__(0.0)
        self.gamma = nn.Parameter(torch.ones(6))

    def forward(self, x):
        x = self.c_proj(self.gelu(self.c_fc(x)))
        return x * self.gamma.to(x.dtype)


class Flattened(NanoGPT):
    def forward(self, x):
        shape = x.shape
        x = x.reshape(-1, shape[-1])
        x = self.c_proj(self.gelu(self.c_fc(x)))
        return x.view(shape)


class Elsewhere(NanoGPT):
    """The block is in another method, and forward computes more."""

    def feed(self, x):
        return self.c_proj(self.gelu(self.c_fc(x)))

    def forward(self, x):
        return self.feed(x).tanh()


class NoisyInTraining(NanoGPT):
    def forward(self, x):
        x = self.c_proj(self.gelu(self.c_fc(x)))
        return x * torch.rand(x.shape[:1] + (1,) * (x.ndim - 1), dtype=x.dtype) if self.training else x


class OtherForOneToken(NanoGPT):
    def forward(self, x):
        if x.shape[-2] == 1:
            return x
        return self.c_proj(self.gelu(self.c_fc(x)))


class Scaled(NanoGPT):
    """forward needs a second argument."""

    def forward(self, x, scale):
        x = self.c_proj(self.gelu(self.c_fc(x)))
        return x * scale


def hooked() -> nn.Module:
    module = sequential(0.0)
    module.register_forward_hook(lambda *_: None)
    return module


def partly_in_eval_mode() -> nn.Module:
    module = sequential(0.4)
    module[2].eval()
    return module


def followed(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 10), nn.GELU(), nn.Linear(10, 6), *layers)


class This(NanoGPT):
    def forward(this, x):
        return this.c_proj(this.gelu(this.c_fc(x)))


def input_clamped(self, x):
    return self.c_proj(self.gelu(self.c_fc(x.clamp(-1e5, 1e5))))


def output_clamped(self, x):
    return self.c_proj(self.gelu(self.c_fc(x))).clamp(-1e5, 1e5)


def nan_replaced(self, x):
    return torch.nan_to_num(self.c_proj(self.gelu(self.c_fc(x))))


def clamped_in_half(self, x):
    y = self.c_proj(self.gelu(self.c_fc(x)))
    return y.clamp(-1, 1) if y.dtype == torch.float16 else y


def doubled_without_gradients(self, x):
    y = self.c_proj(self.gelu(self.c_fc(x)))
    return y if torch.is_grad_enabled() else 2 * y


def input_multiplied_in_place(self, x):
    x.mul_(2)
    return self.c_proj(self.gelu(self.c_fc(x)))


def input_rectified_in_place(self, x):
    return self.c_proj(self.gelu(self.c_fc(F.relu(x, inplace=True))))


def input_zeroed(self, x):
    y = self.c_proj(self.gelu(self.c_fc(x)))
    x.zero_()
    return y


FORWARDS = (
    input_clamped, output_clamped, nan_replaced, clamped_in_half, doubled_without_gradients,
    input_multiplied_in_place, input_rectified_in_place, input_zeroed,
)  # fmt: skip
AROUND = {forward.__name__: forward for forward in FORWARDS}


def around(forward: Callable) -> nn.Module:
    return type("Around", (NanoGPT,), {"forward": forward})(0.0)


MORE = "its forward does more than compute one feed-forward block"
REFUSED = {
    "residual": (lambda: Residual(0.0), MORE),
    "multiplied": (Multiplied, MORE),
    "flattened": (lambda: Flattened(0.0), MORE),
    "elsewhere": (lambda: Elsewhere(0.0), MORE),
    "one token": (lambda: OtherForOneToken(0.0), "its numbers differ"),
    "two arguments": (lambda: Scaled(0.0), MORE),
    "the middle of a layer": (Gated, MORE),
    "another layer after": (lambda: followed(nn.Tanh()), MORE),
    "a norm after": (lambda: followed(nn.LayerNorm(6)), MORE),
    "two blocks": (lambda: followed(nn.Linear(6, 10), nn.GELU(), nn.Linear(10, 6)), MORE),
    "two dropouts after": (lambda: followed(nn.Dropout(0.2), nn.Dropout(0.3)), "it drops 0.44 of its values"),
    "channels dropped": (lambda: followed(nn.Dropout1d(0.3)), "in training mode"),
    "noise": (lambda: NoisyInTraining(0.0), "in training mode"),
    "clamp": (lambda: nn.Sequential(nn.Linear(6, 10), nn.Hardtanh(), nn.Linear(10, 6)), "no activation"),
    "hook": (hooked, "the module has a hook"),
    "modes": (partly_in_eval_mode, "some in eval mode"),
    "swapped": (lambda: swapped(Plain()), "ffn.unswap"),
    "meta": (lambda: sequential(0.0).to("meta"), "meta device"),
    "no block": (lambda: nn.Linear(6, 6), "it does not call two Linears"),
    "empty": (nn.Sequential, "it does not call two Linears"),
    "this": (lambda: This(0.0), "must be named self"),
    **{name: (lambda forward=forward: around(forward), MORE) for name, forward in AROUND.items()},
    **ODD_WEIGHTS,
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_module_that_is_not_one_block_raises_with_the_reason(name: str) -> None:
    make, reason = REFUSED[name]
    module = make()
    flags = [m.training for m in module.modules()]
    with pytest.raises(ValueError, match=r"^module must be one feed-forward block") as error:
        from_module(module)
    assert reason in str(error.value)
    assert "\n" not in str(error.value)
    assert flags == [m.training for m in module.modules()]


def test_a_refused_module_keeps_the_state_of_its_parametrizations() -> None:
    linear = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 10))
    state = copy.deepcopy(linear.state_dict())
    with pytest.raises(ValueError, match="module"):
        from_module(nn.Sequential(linear, nn.GELU(), nn.Linear(10, 6)))
    assert all(torch.equal(value, state[key]) for key, value in linear.state_dict().items())


def test_a_function_raises() -> None:
    with pytest.raises(TypeError, match=r"^module must be"):
        from_module(F.gelu)  # type: ignore[arg-type]


def test_docstring() -> None:
    module = importlib.import_module("ffn.interop.swap.from_module")
    assert doctest.testmod(module, extraglobs={"nn": nn}).failed == 0
