"""LoRA adapters on whole models: they start as the identity, train alone, and save, load and merge."""

import copy
import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ffn import disk
from ffn.gpt.adapters import (
    FILE,
    AdapterConfig,
    adapter_config,
    add_adapters,
    fingerprint,
    load_adapters,
    merge_adapters,
    remove_adapters,
    save_adapters,
)
from ffn.gpt.freeze import render_trained, train_only
from ffn.gpt.transformer import Transformer, TransformerConfig
from ffn.nn.lora import LoRALinear
from ffn.train.optim import ScheduledOptimizer
from tests.gpt.test_freeze import TOKENS, Sorter

CONFIG = TransformerConfig(vocab_size=13, dim=8, num_layers=2, num_heads=2, max_seq_len=6)
EVERYWHERE = AdapterConfig(rank=3, alpha=6.0, targets=("ffn", "attention"))
TARGETS = TOKENS.roll(-1, 1)


def a_model(dtype: torch.dtype = torch.float32, seed: int = 0) -> Transformer:
    torch.manual_seed(seed)
    return Transformer(CONFIG, dtype=dtype).eval()


def adapted(config: AdapterConfig = EVERYWHERE, dtype: torch.dtype = torch.float32) -> Transformer:
    """Return a model with nonzero adapters that train alone."""
    model = a_model(dtype)
    add_adapters(model, config)
    for name, p in model.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(p, 0, 0.5)
    train_only(model, "lora")
    return model


def same(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().items(), b.state_dict().items(), strict=True)
    return all(m == n and torch.equal(s, t) for (m, s), (n, t) in pairs)


@pytest.mark.parametrize(
    ("targets", "leaves"),
    [
        (("ffn",), {"gate_proj", "up_proj", "down_proj"}),
        (("attention",), {"q_proj", "k_proj", "v_proj", "o_proj"}),
        (("q_proj", "ffn", "up_proj"), {"q_proj", "gate_proj", "up_proj", "down_proj"}),
    ],
)
def test_new_adapters_change_no_output(targets: tuple[str, ...], leaves: set[str]) -> None:
    model, base = a_model(), a_model()
    config = AdapterConfig(rank=3, targets=targets)
    names = add_adapters(model, config)
    assert {name.rpartition(".")[2] for name in names} == leaves
    assert len(names) == 2 * len(leaves)
    assert torch.equal(model(TOKENS), base(TOKENS))
    keys = set(model.state_dict())
    assert keys == set(base.state_dict()) | {f"{n}.lora_{x}" for n in names for x in "AB"}
    found = adapter_config(model)
    assert found is not None
    assert (found.rank, found.alpha, found.dropout, set(found.targets)) == (3, 16.0, 0.0, leaves)
    remove_adapters(model)
    assert adapter_config(model) is None
    assert same(model, base)


def test_outputs_and_gradients_follow_the_formula_in_float64() -> None:
    """Compare with a copy that has the weights W + (alpha / rank) B A, by the chain rule of that sum."""
    model = adapted(dtype=torch.float64)
    twin = copy.deepcopy(model)
    merge_adapters(twin)
    torch.testing.assert_close(model(TOKENS), twin(TOKENS), rtol=1e-11, atol=1e-12)
    twin.requires_grad_()
    model.loss(TOKENS, TARGETS).backward()
    twin.loss(TOKENS, TARGETS).backward()
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            dense = twin.get_submodule(name).weight.grad
            a, b = module.lora_A, module.lora_B
            torch.testing.assert_close(a.grad, 2.0 * b.T @ dense, rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(b.grad, 2.0 * dense @ a.T, rtol=1e-9, atol=1e-12)


def test_one_layer_equals_pefts() -> None:
    """The same factors in a PEFT layer give the same output and gradients."""
    peft = pytest.importorskip("peft")
    linear = nn.Linear(6, 10, dtype=torch.float64)
    ours = LoRALinear(linear, 3, 6.0)
    nn.init.normal_(ours.lora_B)
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["0"])
    theirs = peft.get_peft_model(nn.Sequential(copy.deepcopy(linear)), config, autocast_adapter_dtype=False)
    layer = theirs.base_model.model[0]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        a.data, b.data = ours.lora_A.detach().clone(), ours.lora_B.detach().clone()
    x = torch.randn(4, 6, dtype=torch.float64)
    y, their_y = ours(x), theirs(x)
    torch.testing.assert_close(y, their_y)
    dy = torch.randn_like(y)
    found = torch.autograd.grad(y, (ours.lora_A, ours.lora_B), dy)
    for g, expected in zip(found, torch.autograd.grad(their_y, (a, b), dy), strict=True):
        torch.testing.assert_close(g, expected)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_only_adapters_train(optimizer) -> None:
    model = a_model().train()
    add_adapters(model, AdapterConfig(rank=2, dropout=0.2))
    train_only(model, "lora")
    assert model.at_rest == ("embedding",)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    steps = ScheduledOptimizer(model, optimizer, lr=0.1, weight_decay=0.1, l1=0.01)
    for _ in range(2):
        model.loss(TOKENS, TARGETS).backward()
        steps.step()
        steps.zero_grad()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == (".lora_" not in name), name
    assert all(".lora_" in name for name in steps.state_tensors())
    adapters = sum(p.numel() for name, p in model.named_parameters() if ".lora_" in name)
    row = next(line for line in render_trained(model).splitlines() if line.startswith("adapters"))
    assert row.split()[1:] == [f"{adapters:,}", "-"]


def test_merged_adapters_leave_plain_linears_with_the_same_outputs() -> None:
    model = adapted()
    base, expected = a_model(), model(TOKENS)
    merge_adapters(model)
    assert set(model.state_dict()) == set(base.state_dict())
    assert {type(m) for n, m in model.named_modules() if n.endswith("_proj")} == {nn.Linear}
    torch.testing.assert_close(model(TOKENS), expected)
    remove_adapters(model)
    merge_adapters(model)
    torch.testing.assert_close(model(TOKENS), expected)


@pytest.mark.parametrize("name", ["deep/er", "mine.safetensors"])
def test_saved_adapters_load_as_they_were(name: str, tmp_path) -> None:
    model = adapted(AdapterConfig(rank=3, alpha=5.0, dropout=0.25, targets=("up_proj", "attention")))
    file = save_adapters(tmp_path / name, model)
    assert file == (tmp_path / name if "." in name else tmp_path / name / FILE)
    assert [path.name for path in file.parent.iterdir()] == [file.name], "no partial file is left"
    assert all(".lora_" in key for key in load_file(file)), "the file holds no base weights"
    other = a_model()
    load_adapters(tmp_path / name, other)
    assert same(other, model)
    with torch.no_grad():
        assert torch.equal(other(TOKENS), model(TOKENS))
    assert adapter_config(other) == adapter_config(model)
    again = save_adapters(tmp_path / "again.safetensors", other)
    assert again.read_bytes() == file.read_bytes()


def test_adapters_of_a_classifier_load_into_its_backbone(tmp_path) -> None:
    torch.manual_seed(3)
    model = Sorter().eval()
    add_adapters(model)
    nn.init.normal_(model.backbone.blocks[0].feed_forward.up_proj.lora_B)
    train_only(model, "lora")
    assert model.head.weight.requires_grad
    expected = model.backbone(TOKENS)
    file = save_adapters(tmp_path, model)
    remove_adapters(model)
    load_adapters(file, model.backbone)
    assert torch.equal(model.backbone(TOKENS), expected)


def test_a_float32_copy_has_the_fingerprint_of_the_half_precision_model() -> None:
    half = a_model(torch.bfloat16)
    assert fingerprint(half) == fingerprint(copy.deepcopy(half).float())
    assert fingerprint(half) != fingerprint(a_model())
    assert fingerprint(adapted()) == fingerprint(a_model())


def test_another_base_is_refused_and_unchanged(tmp_path) -> None:
    file = save_adapters(tmp_path, adapted())
    other = a_model(seed=1)
    before = copy.deepcopy(other)
    with pytest.raises(ValueError, match=r"adapter\.safetensors: .*fingerprint \w{12}, here \w{12}"):
        load_adapters(file, other)
    assert same(other, before)
    wider = Transformer(TransformerConfig(**{**CONFIG.__dict__, "hidden_dim": 16}))
    with pytest.raises(ValueError, match=r"blocks\.0\..*\.lora_\w .*\(.*\).*\(.*\)$"):
        load_adapters(file, wider)
    deeper = Transformer(TransformerConfig(**{**CONFIG.__dict__, "num_layers": 3}))
    with pytest.raises(ValueError, match=r"blocks\.2\..*\.lora_A .*\(3, 8\).*absent$"):
        load_adapters(file, deeper)
    shallow = Transformer(TransformerConfig(**{**CONFIG.__dict__, "num_layers": 1}))
    with pytest.raises(ValueError, match=r"blocks\.1\..*\.lora_A .*absent.*\(3, 8\)$"):
        load_adapters(file, shallow)
    load_adapters(file, other, check_base=False)
    with pytest.raises(ValueError, match=r"^model .*merge_adapters"):
        load_adapters(file, other, check_base=False)
    with pytest.raises(TypeError, match=r"^model must be .* got \w+Path$"):
        load_adapters(other, file)  # type: ignore[arg-type]


def test_files_without_adapters_are_refused(tmp_path) -> None:
    model = a_model()
    disk.save_model(tmp_path, model)
    with pytest.raises(ValueError, match=r"model\.safetensors: "):
        load_adapters(tmp_path / "model.safetensors", model)
    for facts in ("[1]", "{", json.dumps({"rank": 0, "base": "x"}), json.dumps({"base": "x", "size": 1})):
        save_file({"a": torch.zeros(1)}, tmp_path / FILE, {"adapter": facts})
        with pytest.raises(ValueError, match=r"adapter\.safetensors: "):
            load_adapters(tmp_path, model)
    with pytest.raises(ValueError, match=r"^model .*add_adapters"):
        save_adapters(tmp_path, model)


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = save_adapters(tmp_path, adapted())
    before = file.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device"):
        save_adapters(tmp_path, adapted(AdapterConfig(rank=1)))
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


@pytest.mark.parametrize(
    ("name", "value"),
    [("rank", 0), ("alpha", 0.0), ("dropout", 1.0), ("targets", ()), ("targets", ("mlp",))],
)
def test_a_wrong_value_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^{name}\b"):
        AdapterConfig(**{name: value})


def test_a_hooked_linear_is_refused_and_none_is_adapted() -> None:
    model = a_model()
    model.blocks[1].feed_forward.up_proj.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"^blocks\.1\.feed_forward\.up_proj\b"):
        add_adapters(model)
    assert adapter_config(model) is None, "all or none"


def test_a_model_saved_with_its_adapters_loads_with_them(tmp_path) -> None:
    model = adapted()
    disk.save_model(tmp_path, model)
    loaded = disk.load(tmp_path)
    assert same(loaded, model)
    assert adapter_config(loaded) == adapter_config(model)
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS), model(TOKENS))
    assert disk.inspect(tmp_path)[0] == CONFIG
