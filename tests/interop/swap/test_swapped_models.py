"""Swapped models of transformers: numbers, files, copies, adapters, int8, compilers."""

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

import ffn
from ffn.interop.swap.reroute import Rerouted
from tests.conftest import ROOT
from tests.interop.swap.same import DYNAMOS_OWN, F64

transformers = pytest.importorskip("transformers", reason="these are its models")

pytestmark = [
    DYNAMOS_OWN,
    # transformers: gradient_checkpointing_enable, under the name that all versions have
    pytest.mark.filterwarnings(r"ignore:.*gradient_checkpointing:FutureWarning"),
    # peft: the weight of GPT-2's Conv1D is (in, out)
    pytest.mark.filterwarnings(r"ignore:fan_in_fan_out is set to False:UserWarning"),
]

SIZES = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
HELD = {"max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
NAMES = ["llama", "gpt2", "phi3", "bert", "vit"]
DECODERS = ["llama", "gpt2", "phi3"]
names = pytest.mark.parametrize("name", NAMES)
TARGETS = {
    "llama": ["gate_proj", "up_proj", "down_proj"],
    "gpt2": ["mlp.c_fc", "mlp.c_proj"],
    "phi3": ["gate_up_proj", "down_proj"],
    "bert": ["intermediate.dense", "output.dense"],
    "vit": ["fc1", "fc2"],
}


def build(name: str, p: float = 0.0, dtype: torch.dtype = F64) -> nn.Module:
    t = transformers
    match name:
        case "llama":
            model = t.LlamaForCausalLM(t.LlamaConfig(intermediate_size=24, **SIZES, **HELD))
        case "gpt2":
            drops = {"resid_pdrop": p, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
            sizes = {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
            ids = {"bos_token_id": 1, "eos_token_id": 2}
            model = t.GPT2LMHeadModel(t.GPT2Config(**sizes, **drops, **ids))
        case "phi3":
            model = t.Phi3ForCausalLM(t.Phi3Config(intermediate_size=24, resid_pdrop=p, **SIZES, **HELD))
        case "bert":
            drops = {"hidden_dropout_prob": p, "attention_probs_dropout_prob": 0.0}
            config = t.BertConfig(intermediate_size=24, max_position_embeddings=32, **SIZES, **drops)
            model = t.BertForMaskedLM(config)
        case _:
            sizes = {key: value for key, value in SIZES.items() if key != "vocab_size"}
            config = t.ViTConfig(
                intermediate_size=24, image_size=8, patch_size=4, hidden_dropout_prob=p, **sizes
            )
            model = t.ViTForImageClassification(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape) * 0.1)
    return model.to(dtype).eval()


def inputs(name: str, dtype: torch.dtype = F64) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(3)
    if name == "vit":
        return {"pixel_values": torch.randn(2, 3, 8, 8, generator=g).to(dtype)}
    ids = torch.randint(3, 50, (2, 6), generator=g)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def logits(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    return model(**given).logits


def outcome(model: nn.Module, given: dict[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    """Return the logits and the gradients of all trained parameters."""
    model.zero_grad()
    torch.manual_seed(seed)
    y = logits(model, given)
    (y * torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), **grads}


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-9) -> None:
    """Assert equality up to rounding, also of gradients that are zero (of a key's bias)."""
    floor = 1e-6 * max(float(value.abs().max()) for value in expected.values())
    assert list(found) == list(expected)
    for n, wanted in expected.items():
        assert (found[n] - wanted).abs().max() <= tolerance * (wanted.abs().max() + floor), n


def swapped(model: nn.Module) -> nn.Module:
    report = ffn.swap(model)
    assert [block.action for block in report] == ["swapped"] * 2, str(report)
    return model


def pair(name: str, **options) -> tuple[nn.Module, nn.Module, dict[str, Tensor]]:
    old = build(name, **options)
    return old, swapped(copy.deepcopy(old)), inputs(name, options.get("dtype", F64))


@names
@pytest.mark.parametrize("training", [False, True])
def test_outputs_and_all_gradients_are_equal(name: str, training: bool) -> None:
    old, new, given = pair(name)
    assert_near(outcome(new.train(training), given), outcome(old.train(training), given))
    assert len(outcome(new, given)) == 1 + len(list(old.parameters()))


@names
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shorter_dtypes_are_equal_up_to_rounding(name: str, dtype: torch.dtype) -> None:
    old, new, given = pair(name, dtype=dtype)
    y, expected = outcome(new, given)["y"].double(), outcome(old, given)["y"].double()
    assert (y - expected).abs().max() <= 16 * torch.finfo(dtype).eps * expected.abs().max()


@pytest.mark.parametrize("name", ["gpt2", "phi3", "bert", "vit"])
def test_dropout_outside_the_block_draws_the_same_masks(name: str) -> None:
    """None of these models drops between the products, so equal seeds give equal masks."""
    old, new, given = pair(name, p=0.3)
    expected = outcome(old.train(), given, 4)
    assert_near(outcome(new.train(), given, 4), expected)
    assert not torch.equal(outcome(new, given, 5)["y"], expected["y"])


@names
def test_state_dicts_files_and_copies_give_the_same(name: str, tmp_path) -> None:
    old, new, given = pair(name)
    assert list(new.state_dict()) == list(old.state_dict())
    expected = outcome(old, given)
    new.save_pretrained(tmp_path)
    loaded, told = type(old).from_pretrained(tmp_path, dtype=F64, output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    assert not any(isinstance(m, Rerouted) for m in loaded.modules())
    assert_near(outcome(loaded.eval(), given), expected)
    buffer = io.BytesIO()
    torch.save(new, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=False)
    for other in (saved, copy.deepcopy(new), pickle.loads(pickle.dumps(new))):
        assert sum(isinstance(m, Rerouted) for m in other.modules()) == 2
        assert_near(outcome(other, given), expected)
        with torch.no_grad():
            for p in other.parameters():
                p.zero_()
    assert_near(outcome(new, given), expected)


def test_a_pickle_loads_in_a_process_that_never_swapped(tmp_path) -> None:
    _, model, given = pair("bert")
    torch.save((model, given, logits(model, given)), tmp_path / "model.pt")
    code = """if 1:
        import sys, torch
        model, given, expected = torch.load(sys.argv[1], weights_only=False)
        assert torch.equal(model(**given).logits, expected)
        block = model.bert.encoder.layer[0]
        from ffn.interop.swap.reroute import reason_not_to
        assert reason_not_to(block, block._ffn_plan) is None
    """
    command = [sys.executable, "-c", code, str(tmp_path / "model.pt")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_patched_class_of_the_last_product_takes_effect(monkeypatch) -> None:
    from transformers.models.bert.modeling_bert import BertOutput

    old, new, given = pair("bert")
    written = BertOutput.forward
    monkeypatch.setattr(BertOutput, "forward", lambda self, h, x: 2 * written(self, h, x))
    assert_near(outcome(new, given), outcome(old, given))
    monkeypatch.undo()
    assert_near(outcome(new, given), outcome(old, given))


@pytest.mark.parametrize("name", DECODERS)
def test_generation_is_the_same(name: str) -> None:
    old, new, given = pair(name)
    for options in ({"do_sample": False}, {"do_sample": True, "top_k": 5}):
        tokens = []
        for model in (old, new):
            torch.manual_seed(0)
            tokens.append(model.generate(**given, max_new_tokens=6, pad_token_id=0, **options))
        assert torch.equal(*tokens)


@names
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same(name: str, reentrant: bool) -> None:
    old, new, given = pair(name)
    expected = outcome(old.train(), given)
    new.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
    if name == "vit":
        given["pixel_values"].requires_grad_()
    else:
        new.enable_input_require_grads()
    assert_near(outcome(new, given), expected)


@names
def test_hooks_on_children_fire(name: str) -> None:
    _, model, given = pair(name)
    block = next(m for m in model.modules() if isinstance(m, Rerouted))
    plan = block._ffn_plan
    for path in (*plan.first, plan.last):
        fired: list[int] = []
        handle = block.get_submodule(path).register_forward_hook(lambda *_, fired=fired: fired.append(1))
        logits(model, given)
        handle.remove()
        logits(model, given)
        assert fired == [1]


@names
def test_adapters_take_effect_before_and_after_a_swap(name: str) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=TARGETS[name], init_lora_weights=False)
    old, new, given = pair(name)
    plain = outcome(old, given)["y"]
    torch.manual_seed(1)
    expected = peft.get_peft_model(old, config).double().eval()
    after = peft.get_peft_model(new, config).double().eval()
    after.load_state_dict(expected.state_dict())
    before = peft.get_peft_model(build(name), config).double().eval()
    before.load_state_dict(expected.state_dict())
    assert ffn.swap(before).swapped == []
    wanted = outcome(expected, given)
    assert sum("lora" in key for key in wanted) >= 2 * 2 * len(TARGETS[name])
    assert not torch.allclose(wanted["y"], plain)
    for model in (after, before):
        found = outcome(model, given)
        assert_near(found, wanted)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
        optimizer.step()
        assert not torch.allclose(logits(model, given), found["y"]), "a training step must have an effect"
        model.load_state_dict(expected.state_dict())
        merged = model.merge_and_unload()
        assert_near({"y": logits(merged, given)}, {"y": wanted["y"]})
    blocks = [m for m in after.modules() if isinstance(m, Rerouted)]
    assert [ffn.interop.swap.reroute.reason_not_to(m, m._ffn_plan) for m in blocks] == [None] * 2


@pytest.mark.parametrize("name", ["llama", "phi3", "bert", "vit"])
def test_int8_weights_of_torchao_take_effect(name: str) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    old, new, given = pair(name, dtype=torch.float32)
    plain = logits(old, given)
    for model in (old, new):
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    with torch.no_grad():
        assert torch.equal(logits(new, given), logits(old, given))
        assert not torch.equal(logits(new, given), plain)


@names
def test_compile_and_export_give_the_same(name: str) -> None:
    old, new, given = pair(name)
    given = {key: value for key, value in given.items() if key != "attention_mask"}
    options = {} if name in ("bert", "vit") else {"use_cache": False}
    expected = outcome(old, given)
    compiled = torch.compile(new, fullgraph=True, backend="aot_eager")
    new.zero_grad()
    y = compiled(**given, **options).logits
    (y * torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    grads = {n: p.grad for n, p in new.named_parameters() if p.grad is not None}
    assert_near({"y": y.detach(), **grads}, expected)
    with torch.no_grad():
        exported = torch.export.export(new, (), {**given, **options}).module()
    assert_near({"y": exported(**given, **options).logits}, {"y": expected["y"]})
