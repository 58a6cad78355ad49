"""timm's blocks among others' code: later changes, hooks, adapters, copies, casts, compilers, transforms."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import ffn.interop.timm as page
from tests.interop.swap.same import DYNAMOS_OWN, F64, assert_same, kept, outcome, twin
from tests.interop.timm_blocks import build, names, rows, written_out

pytestmark = DYNAMOS_OWN


@names
def test_a_dropouts_own_mode_and_later_changes_count(name: str) -> None:
    block, x = build(name, drop=(0.5, 0.5)), rows()
    still = copy.deepcopy(block).eval()(x)
    block.drop1.eval()
    block.drop2.eval()
    assert_same({"y": block(x)}, {"y": still})
    block.drop1.train()
    block.drop1.p = 0.0
    assert_same({"y": block(x)}, {"y": still})
    block.drop2.p, block.drop2.training = 1.0, True
    assert not block(x).any()
    block.eval()
    block.act = nn.ReLU()
    assert_same({"y": block(x)}, {"y": written_out(block, x)})
    block.norm = nn.LayerNorm(block.fc2.in_features, dtype=F64)
    assert_same({"y": block(x)}, {"y": written_out(block, x)})


@names
def test_hooks_of_all_children_fire(name: str) -> None:
    block, x = build(name, drop=0.2), rows().requires_grad_()
    for child in block.children():
        for register in ("forward_pre_hook", "forward_hook", "full_backward_pre_hook", "full_backward_hook"):
            fired = []
            handle = getattr(child, f"register_{register}")(lambda *_, fired=fired: fired.append(1))
            block(x).sum().backward()
            handle.remove()
            assert fired == [1], (register, child)


@names
def test_replaced_children_are_called(name: str) -> None:
    x = rows()
    for child in ("fc1", "fc1_g", "fc1_x", "fc2"):
        block = build(name)
        if not hasattr(block, child):
            continue
        before, old = block(x), getattr(block, child)
        setattr(block, child, nn.Sequential(old, nn.Hardtanh(-0.1, 0.1)))
        assert not torch.allclose(block(x), before)
        assert_same({"y": block(x)}, {"y": written_out(block, x)})


@names
def test_copies_and_casts(name: str) -> None:
    block, x = build(name, drop=0.3), rows()
    buffer = io.BytesIO()
    torch.save(block, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block)), loaded):
        assert_same(outcome(other, x), outcome(block, x))
        with torch.no_grad():
            other.fc2.weight.zero_()
        assert block.fc2.weight.any()
    half = build(name, dtype=None).to(torch.bfloat16)
    assert half(x.bfloat16()).dtype == torch.bfloat16
    meta = getattr(page, name)(6, 10, device="meta")
    assert meta(torch.empty(3, 6, device="meta")).shape == (3, 6)
    single = block.float()
    with torch.autocast("cpu", torch.bfloat16):
        y = single(x.float())
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in single.parameters())


@names
def test_compile_fx_vmap_and_functional_calls_see_the_block(name: str) -> None:
    block, x = build(name), rows()
    expected = outcome(block, x)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    found = outcome(compiled, x)
    assert_same(dict(zip(expected, found.values(), strict=True)), expected)
    y = expected["y"]
    assert_same({"y": torch.fx.symbolic_trace(block)(x)}, {"y": y})
    assert_same({"y": torch.vmap(block)(x)}, {"y": y})
    state = {key: value.detach() for key, value in block.state_dict().items()}
    assert_same({"y": torch.func.functional_call(block, state, (x,))}, {"y": y})
    exported = torch.export.export(block, (x,)).module()
    assert_same({"y": exported(x)}, {"y": y})


def test_adapters_of_peft_take_effect() -> None:
    peft = pytest.importorskip("peft")
    timm = pytest.importorskip("timm.layers.mlp")
    ours, theirs = build("Mlp", out_features=6), build("Mlp", timm, out_features=6)
    twin(theirs, ours)
    x = rows()
    before = ours(x)
    config = peft.LoraConfig(r=2, target_modules=["fc1", "fc2"], init_lora_weights=False)
    adapted = [peft.get_peft_model(nn.Sequential(block), config).double() for block in (ours, theirs)]
    adapted[0].load_state_dict(adapted[1].state_dict())
    found, expected = (outcome(model, x) for model in adapted)
    assert sum("lora" in name for name in found) == 4
    assert_same(found, expected)
    assert not torch.allclose(found["y"], before)
    merged = adapted[0].merge_and_unload()
    assert_same({"y": merged(x)}, {"y": found["y"]})
    assert kept(merged[0].requires_grad_(), x) == {F64: 6 * 16}, "the op has the weights again"
