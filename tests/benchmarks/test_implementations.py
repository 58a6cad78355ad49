"""Every implementation equals the plain block in output and gradients, or raises with a reason."""

import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import peers
from benchmarks.cases import Block, Case
from benchmarks.implementations import IMPLEMENTATIONS, Contender, Weights, always, never, pinned
from benchmarks.plain import MODULES, Plain
from benchmarks.report import version
from benchmarks.tiles import CANDIDATES
from ffn import FeedForward, activations
from ffn.ops.kernels import tilings

GELU = Case(Block("gelu", 7, 13, "gelu", True, ""), 5)
GELU_TANH = Case(Block("gelu_tanh", 7, 13, "gelu_tanh", True, ""), 5)
SWIGLU = Case(Block("swiglu", 7, 13, "swiglu", False, ""), 5)
GEGLU_TANH = Case(Block("geglu_tanh", 7, 13, "geglu_tanh", False, ""), 5)
WIDE = Case(Block("wide", 512, 512, "gelu", True, ""), 5, work="inference")
ALL = [GELU, GELU_TANH, SWIGLU, GEGLU_TANH]
PLAIN, GATED = ALL[:2], ALL[2:]
ON_CPU = {
    "torch": ALL,
    "TransformerEncoderLayer": PLAIN,
    "hf LlamaMLP": GATED,
    "hf GPT2MLP": [GELU_TANH],
    "x-transformers": ALL,
    "timm": ALL,
    "ffn": ALL,
    "ffn eager": ALL,
    "ffn save=input": ALL,
}
EACH = [(name, case) for name, cases in ON_CPU.items() for case in cases]
DROPPING = ("torch", "TransformerEncoderLayer", "x-transformers", "timm", "ffn")
TORCHS_OWN = pytest.mark.filterwarnings(r"ignore:`torch\.jit\.\w+` is deprecated:DeprecationWarning")


def plain_of(case: Case) -> Plain:
    block = case.block
    return Plain(block.dim, block.hidden_dim, block.activation, 0.0, block.bias)


def build(name: str, case: Case, weights: Weights | None = None) -> Contender:
    try:
        return IMPLEMENTATIONS[name](case, plain_of(case).state_dict() if weights is None else weights)
    except ModuleNotFoundError as error:
        pytest.skip(f"{name} wants {error.name}, which is not installed")


def error_of(found: Tensor, exact: Tensor) -> float:
    assert found.shape == exact.shape
    return ((found.double() - exact).norm() / exact.norm()).item()


def check(contender: Contender, case: Case, weights: Weights) -> None:
    """Check output and, in training, gradients against the plain block in float64."""
    exact = plain_of(case).double()
    exact.load_state_dict(weights)
    x, dy = torch.randn(2, case.tokens, case.block.dim).unbind()
    inputs = [x.clone().requires_grad_(), x.double().requires_grad_()]
    with contender.setting(), torch.set_grad_enabled(case.work == "training"):
        outputs = [contender.module(inputs[0]), exact(inputs[1])]
    assert error_of(*outputs) < 1e-5
    if case.work == "inference":
        return
    for y in outputs:
        y.backward(dy.to(y))
    assert error_of(inputs[0].grad, inputs[1].grad) < 1e-5
    gradients = contender.gradients()
    assert set(gradients) == set(weights)
    for name, p in exact.named_parameters():
        assert gradients[name].device == weights[name].device
        assert error_of(gradients[name], p.grad) < 1e-5, name


@pytest.mark.parametrize(("name", "case"), EACH, ids=str)
def test_output_and_gradients_equal_the_plain_block(name: str, case: Case) -> None:
    weights = plain_of(case).state_dict()
    kept = {key: w.clone() for key, w in weights.items()}
    contender = build(name, case, weights)
    check(contender, case, weights)
    ours = {w.data_ptr() for w in weights.values()}
    assert all(p.data_ptr() not in ours for p in contender.module.parameters()), "has copies of its own"
    assert all(torch.equal(w, kept[key]) for key, w in weights.items())


@pytest.mark.parametrize("name", ["x-transformers", "timm", "ffn", "hf LlamaMLP"])
def test_biases_of_a_gated_block_are_copied(name: str) -> None:
    case = replace(SWIGLU, block=replace(SWIGLU.block, bias=True))
    weights = plain_of(case).state_dict()
    check(build(name, case, weights), case, weights)


@pytest.mark.parametrize("name", DROPPING)
def test_dropout_follows_the_activation_and_nothing_else(name: str) -> None:
    case = replace(GELU, dropout=0.999999)  # drops all of the 65 values
    weights = plain_of(case).state_dict()
    contender = build(name, case, weights)
    y = contender.module.train()(torch.randn(case.tokens, case.block.dim))
    assert torch.equal(y, weights["down_proj.bias"].expand_as(y))
    check(contender._replace(module=contender.module.eval()), case, weights)


def test_versions_and_backends_are_noted() -> None:
    assert build("ffn", GELU).note == "backend eager"
    assert build("timm", GELU).note == version("timm")
    assert (
        build("x-transformers", SWIGLU).note == version("x-transformers") + ", less a bias that it has always"
    )


@TORCHS_OWN
def test_compiled_is_the_block_compiled() -> None:
    for name in ("torch.compile", "torch max-autotune", "ffn compiled"):
        module, _, _, note = build(name, GELU)
        assert isinstance(module, FeedForward if name == "ffn compiled" else Plain)
        assert module._compiled_call_impl is not None
        assert note == ("backend eager, compiled" if name == "ffn compiled" else "")


def test_packed_block_equals_the_plain_one_in_inference() -> None:
    weights = plain_of(WIDE).state_dict()
    contender = build("ffn packed", WIDE, weights)
    assert contender.note == "backend packed"
    check(contender, WIDE, weights)


REFUSED = [
    ("TransformerEncoderLayer", SWIGLU, "has no gated block"),
    ("hf LlamaMLP", GELU, "has no gelu block"),
    ("hf LlamaMLP", replace(SWIGLU, dropout=0.1), "has no dropout"),
    ("hf GPT2MLP", GELU, "GPT-2 has gelu_tanh"),
    ("hf GPT2MLP", replace(GELU_TANH, dropout=0.1), "has its dropout behind the second product"),
    ("hf GPT2MLP", replace(GELU_TANH, block=replace(GELU_TANH.block, bias=False)), "has a bias always"),
    ("torch", replace(GELU, block=replace(GELU.block, activation="relu2")), "torch.nn has no relu2"),
    ("timm", replace(GELU, block=replace(GELU.block, activation="quick_gelu")), "torch.nn has no quick_gelu"),
    ("ffn triton", GELU, "the kernels run on NVIDIA GPUs, not on cpu"),
    ("ffn packed", GELU, "is for inference"),
    ("ffn packed", replace(WIDE, dtype="autocast"), "takes no part in autocast"),
    ("ffn packed", replace(GELU, work="inference"), "nothing to pack"),
]
ON_GPUS = ("liger", "liger fused", "liger tiled", "quack", "quack tuned", "torchao float8")
ON_GPUS += ("ffn fused", "ffn unfused")
REFUSED += [(name, case, "^runs on GPUs$") for name in ON_GPUS for case in (SWIGLU, GELU)]


@pytest.mark.parametrize(("name", "case", "reason"), REFUSED, ids=str)
def test_unsupported_cases_raise(name: str, case: Case, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        IMPLEMENTATIONS[name](case, plain_of(case).state_dict())


REFUSED_ON_GPUS = [
    ("liger", GELU, "has no gelu block"),
    ("liger tiled", replace(GEGLU_TANH, block=replace(GEGLU_TANH.block, bias=True)), "has no biases"),
    ("liger fused", replace(SWIGLU, dropout=0.1), "has no dropout"),
    ("liger fused", GEGLU_TANH, "has no geglu_tanh block"),
    ("liger fused", replace(SWIGLU, dtype="autocast"), "takes no part in autocast"),
    ("quack", GELU, "has no gelu block"),
    ("quack", replace(SWIGLU, dropout=0.1), "has no dropout"),
    ("quack tuned", GELU_TANH, "falls back to torch where a bias is trained"),
    ("quack", SWIGLU, "falls back to torch unless 8 divides the widths"),
    ("torchao float8", replace(GELU, work="inference"), "is for training"),
    ("ffn packed", WIDE, "runs on CPUs"),
]


@pytest.mark.parametrize(("name", "case", "reason"), REFUSED_ON_GPUS, ids=str)
def test_unsupported_cases_on_gpus_raise(name: str, case: Case, reason: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=reason):
        IMPLEMENTATIONS[name](case, plain_of(case).state_dict())


@TORCHS_OWN
@pytest.mark.parametrize("name", ["liger", "liger fused", "liger tiled", "torchao float8"])
def test_gpu_implementations_get_the_weights(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "require_gpu", lambda weights: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    weights = plain_of(SWIGLU).state_dict()
    contender = build(name, SWIGLU, weights)
    state = contender.module.state_dict()
    assert set(contender.gradients()) == set(weights) == set(state)
    assert all(torch.equal(state[key], w) for key, w in weights.items())
    assert contender.note.startswith(("liger-kernel ", "torchao "))


@pytest.mark.parametrize("activation", ["swiglu", "gelu_tanh"])
def test_quack_gets_gate_and_up_interleaved(activation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class MLP(nn.Module):  # with quack's layout of weights
        def __init__(self, in_features, hidden_features, *, activation: str, bias1, bias2, tuned):
            super().__init__()
            self.gated = activation == "swiglu"
            self.fc1 = nn.Linear(in_features, hidden_features * (1 + self.gated), bias=bias1)
            self.fc2 = nn.Linear(hidden_features, in_features, bias=bias2)

        def forward(self, x: Tensor) -> Tensor:
            pre = self.fc1(x)
            if not self.gated:
                return self.fc2(F.gelu(pre, approximate="tanh"))
            return self.fc2(F.silu(pre[..., ::2]) * pre[..., 1::2])

    module = ModuleType("quack.mlp")
    module.MLP = MLP
    monkeypatch.setitem(sys.modules, "quack", ModuleType("quack"))
    monkeypatch.setitem(sys.modules, "quack.mlp", module)
    monkeypatch.setattr(peers, "require_gpu", lambda weights: None)
    case = Case(Block("", 16, 24, activation, bias=False, source=""), 5)
    weights = plain_of(case).state_dict()
    contender = build("quack", case, weights)
    assert contender.note.endswith("quack-kernels") or "quack-kernels " in contender.note
    check(contender, case, weights)


def test_pinned_replaces_the_choice_within_its_context() -> None:
    choose = tilings.choose
    case = (True, (9, 0), "bfloat16", True, 4096, 14336, 8192)
    with pinned(always):
        assert tilings.choose(*case) == CANDIDATES[True, True][0]
        with pinned(never):
            assert tilings.choose(*case) is None
    assert tilings.choose is choose


def test_fused_and_unfused_run_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "require_gpu", lambda weights: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    with pytest.raises(ValueError, match="has no tiles for this GPU"):
        build("ffn fused", GELU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    with build("ffn unfused", GELU).setting():
        assert tilings.choose is never
    with build("ffn fused", GELU).setting():
        assert tilings.choose is always


@pytest.mark.parametrize("name", [*MODULES, *activations.GATES])
def test_plain_block_equals_the_table(name: str) -> None:
    case = Case(Block("", 5, 6, name, True, ""), 3)
    plain, x = plain_of(case).double(), torch.randn(3, 5, dtype=torch.float64)
    act, up = activations.TABLE[name], plain.up_proj(x)
    h = act.formula(plain.gate_proj(x))[0] * up if act.gated else act.formula(up)[0]
    torch.testing.assert_close(plain(x), plain.down_proj(h))
