"""LlamaMLP and GPT2MLP: signatures, keys, numbers of the originals, less kept, children called."""

import copy
import pickle
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ffn.interop.hf import GPT2MLP, LlamaMLP
from tests.interop.swap.same import DYNAMOS_OWN, F64, assert_same, kept, outcome, parameters_of, twin

pytestmark = DYNAMOS_OWN
transformers = pytest.importorskip("transformers", reason="these blocks are built of its parts")

from transformers.activations import ACT2CLS  # noqa: E402
from transformers.models.gpt2 import modeling_gpt2  # noqa: E402
from transformers.models.llama import modeling_llama  # noqa: E402
from transformers.pytorch_utils import Conv1D  # noqa: E402

ACTIVATIONS = [name for name in ACT2CLS if name != "xielu"]  # in bfloat16, with buffers that double() breaks
KINDS = ["llama", "gpt2"]
kinds = pytest.mark.parametrize("kind", KINDS)
OURS = {"llama": LlamaMLP, "gpt2": GPT2MLP}
ORIGINALS = {"llama": modeling_llama.LlamaMLP, "gpt2": modeling_gpt2.GPT2MLP}


def build(
    kind: str, classes: dict, *, act: str | None = None, bias: bool = False, p: float = 0.0
) -> nn.Module:
    if kind == "llama":
        config = {"intermediate_size": 10, "hidden_act": act or "silu", "mlp_bias": bias}
        return classes[kind](SimpleNamespace(hidden_size=6, **config)).double()
    config = {"activation_function": act or "gelu_new", "resid_pdrop": p}
    return classes[kind](10, SimpleNamespace(hidden_size=6, **config)).double()


def rows() -> Tensor:
    return torch.randn(2, 3, 6, dtype=F64)


@kinds
def test_signatures_children_and_draws_are_the_originals(kind: str) -> None:
    assert parameters_of(OURS[kind]) == parameters_of(ORIGINALS[kind])
    assert parameters_of(OURS[kind].forward) == parameters_of(ORIGINALS[kind].forward)
    drawn = []
    for classes in (OURS, ORIGINALS):
        torch.manual_seed(4)
        drawn.append(build(kind, classes, bias=True, p=0.1))
    assert repr(drawn[0]) == repr(drawn[1])
    assert vars(drawn[0]).keys() == vars(drawn[1]).keys()
    assert_same(drawn[0].state_dict(), drawn[1].state_dict(), 0.0)
    assert len(drawn[0].state_dict()) == (6 if kind == "llama" else 4)


@kinds
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_numbers_are_the_originals(kind: str, act: str) -> None:
    ours, theirs = (build(kind, classes, act=act, bias=True) for classes in (OURS, ORIGINALS))
    twin(theirs, ours)
    tolerance = 1e-10 if act == "gelu_fast" else 1e-12  # its constant has ten digits
    for x in (rows(), rows()[0], rows().transpose(0, 1).contiguous()):
        assert_same(outcome(ours, x), outcome(theirs, x), tolerance)


def test_numbers_are_the_formulas() -> None:
    block, x = build("llama", OURS), rows()
    gate, up, down = (linear.weight for linear in (block.gate_proj, block.up_proj, block.down_proj))
    assert_same({"y": block(x)}, {"y": (F.silu(x @ gate.t()) * (x @ up.t())) @ down.t()})
    block = build("gpt2", OURS)
    hidden = F.gelu(x @ block.c_fc.weight + block.c_fc.bias, approximate="tanh")
    assert_same({"y": block(x)}, {"y": hidden @ block.c_proj.weight + block.c_proj.bias})


@kinds
def test_what_is_kept_for_backward(kind: str) -> None:
    hidden = {"llama": 20, "gpt2": 10}[kind]
    assert kept(build(kind, OURS), rows()) == {F64: 6 * (6 + hidden)}
    assert kept(build(kind, ORIGINALS), rows())[F64] > 6 * (6 + hidden)
    if kind == "gpt2":
        assert kept(build(kind, OURS, p=0.2), rows()) == {F64: 6 * 16, torch.int64: 1}


def test_dropout_stands_after_c_proj_and_repeats_by_seed() -> None:
    block = GPT2MLP(64, SimpleNamespace(hidden_size=64, activation_function="linear", resid_pdrop=0.5))
    nn.init.eye_(block.c_fc.weight)
    nn.init.eye_(block.c_proj.weight)
    x = torch.ones(64, 64)
    first, again = outcome(block, x, 1), outcome(block, x, 1)
    assert set(first["y"].unique().tolist()) == {0.0, 2.0}
    assert abs((first["y"] == 0).float().mean() - 0.5) < 0.05
    assert_same(again, first)
    assert (first["x"] != 0).float().mean() == (first["y"] != 0).float().mean(), "one mask both ways"
    assert torch.equal(block.eval()(x), x)


@kinds
def test_hooks_of_all_children_fire_and_replaced_ones_are_called(kind: str) -> None:
    x = rows().requires_grad_()
    for name, _ in build(kind, OURS).named_children():
        block, fired = build(kind, OURS), []
        block.get_submodule(name).register_forward_hook(lambda *_, fired=fired: fired.append(1))
        block.get_submodule(name).register_full_backward_hook(lambda *_, fired=fired: fired.append(1))
        before = block(x)
        before.sum().backward()
        assert fired == [1, 1]
        setattr(block, name, nn.Sequential(block.get_submodule(name), nn.Softplus()))
        assert not torch.allclose(block(x), before)


@kinds
def test_copies_and_compile(kind: str) -> None:
    block, x = build(kind, OURS, bias=True), rows()
    expected = outcome(block, x)
    for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert_same(outcome(other, x), expected)
    found = outcome(torch.compile(block, fullgraph=True, backend="aot_eager"), x)
    assert_same(dict(zip(expected, found.values(), strict=True)), expected)
    single = block.float()
    with torch.autocast("cpu", torch.bfloat16):
        y = single(x.float())
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.shape == p.shape for p in single.parameters())


@kinds
def test_adapters_of_peft_take_effect(kind: str) -> None:
    peft = pytest.importorskip("peft")
    ours, theirs = build(kind, OURS), build(kind, ORIGINALS)
    twin(theirs, ours)
    x = rows()
    before = ours(x).detach()
    targets = [name for name, child in ours.named_children() if isinstance(child, nn.Linear | Conv1D)]
    options = {
        "r": 2,
        "target_modules": targets,
        "init_lora_weights": False,
        "fan_in_fan_out": kind == "gpt2",
    }
    adapted = [
        peft.get_peft_model(nn.Sequential(block), peft.LoraConfig(**options)).double()
        for block in (ours, theirs)
    ]
    adapted[0].load_state_dict(adapted[1].state_dict())
    found, expected = (outcome(model, x) for model in adapted)
    assert sum("lora" in name for name in found) == 2 * len(targets)
    assert_same(found, expected)
    assert not torch.allclose(found["y"], before)
    merged = adapted[0].merge_and_unload()
    assert_same({"y": merged(x)}, {"y": found["y"]})


def model(kind: str) -> nn.Module:
    torch.manual_seed(1)
    if kind == "llama":
        config = transformers.LlamaConfig(
            vocab_size=17, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
        )
        return transformers.LlamaForCausalLM(config).double()
    config = transformers.GPT2Config(vocab_size=17, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    return transformers.GPT2LMHeadModel(config).double()


@kinds
def test_a_model_of_them_is_the_original(kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    theirs = model(kind).eval()
    home = {"llama": modeling_llama, "gpt2": modeling_gpt2}[kind]
    monkeypatch.setattr(home, OURS[kind].__name__, OURS[kind])
    ours = model(kind).eval()
    assert sum(type(m) is OURS[kind] for m in ours.modules()) == 2
    assert_same(ours.state_dict(), theirs.state_dict(), 0.0)  # drawn alike, scaled projections too
    tokens = torch.randint(17, (2, 5))
    results = []
    for m in (ours, theirs):
        out = m(tokens, labels=tokens)
        out.loss.backward()
        results.append({"logits": out.logits, **{name: p.grad for name, p in m.named_parameters()}})
    assert_same(*results, 1e-11)
    ours.save_pretrained(tmp_path)
    again = type(theirs).from_pretrained(tmp_path, dtype=F64)
    assert sum(type(m) is OURS[kind] for m in again.modules()) == 2
    assert_same({"logits": again.eval()(tokens).logits}, {"logits": results[0]["logits"]})


def test_without_transformers_a_line_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers.activations", None)
    for kind in KINDS:
        message = "this block is built of transformers' own parts: pip install transformers"
        with pytest.raises(ImportError, match=f"^{re.escape(message)}$"):
            build(kind, OURS)
