"""Swapped models on two processes: fully sharded by layer and by Linear, tensor-parallel, data-parallel."""

import copy
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn import functional as F

import ffn
from ffn.interop.swap.reroute import Rerouted, reason_not_to

# torch's tensor-parallel plans do not know Conv1D, and split a packed product between gate and up
NOT_PARALLEL = {("gpt2", "parallel"), ("phi3", "parallel")}

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this build of torch has no gloo"
)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.gate_proj, self.up_proj = nn.Linear(8, 16, bias=False), nn.Linear(8, 16, bias=False)
        self.down_proj = nn.Linear(16, 8, bias=False)

    def forward(self, x):
        h = self.norm(x)
        return x + self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))


def build() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    old = nn.Sequential(Block(), Block(), nn.Linear(8, 8)).double()
    new = copy.deepcopy(old)
    assert len(ffn.swap(new).swapped) == 2
    return old, new


def step(model: nn.Module, x: Tensor) -> Tensor:
    """Return the output after a training step."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    y = model(x).detach()
    return y.full_tensor() if hasattr(y, "full_tensor") else y


def blocks(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, Rerouted)]


def fully_sharded(by_linear: bool) -> None:
    from torch.distributed.fsdp import fully_shard

    old, new = build()
    x = torch.randn(4, 8, dtype=torch.float64)
    expected = step(old, x)
    for block in new[:2]:
        for linear in [m for m in block.modules() if isinstance(m, nn.Linear)] if by_linear else ():
            fully_shard(linear)
        fully_shard(block)
    fully_shard(new)
    torch.testing.assert_close(step(new, x), expected, rtol=1e-10, atol=1e-12)
    assert len(blocks(new)) == 2
    for block in blocks(new):
        assert (reason_not_to(block, block._ffn_plan) is not None) or not by_linear
    with pytest.raises(RuntimeError, match="unswap before"):  # FSDP changed its class
        ffn.unswap(new)


def tensor_parallel() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    old, new = build()
    x = torch.randn(4, 8, dtype=torch.float64)
    expected = step(old, x)
    plan = {"gate_proj": ColwiseParallel(), "up_proj": ColwiseParallel(), "down_proj": RowwiseParallel()}
    for block in new[:2]:
        parallelize_module(block, init_device_mesh("cpu", (2,)), plan)
    assert new[0].up_proj.weight.to_local().shape == (8, 8)
    torch.testing.assert_close(step(new, x), expected, rtol=1e-10, atol=1e-12)


def data_parallel() -> None:
    old, new = build()
    x = torch.randn(4, 8, dtype=torch.float64)
    expected = step(old, x)
    torch.testing.assert_close(
        step(nn.parallel.DistributedDataParallel(new), x), expected, rtol=1e-10, atol=1e-12
    )
    assert all(reason_not_to(block, block._ffn_plan) is None for block in blocks(new))


def whole_model(name: str, how: str) -> None:
    """Check a model of transformers: its layers or each Linear sharded, or its blocks tensor-parallel."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    from tests.interop.swap import test_swapped_models as models

    torch.manual_seed(0)
    old, new, given = models.pair(name)
    mesh = init_device_mesh("cpu", (2,))
    for block in blocks(new):
        plan = block._ffn_plan
        if how == "parallel":
            styles = {path: ColwiseParallel() for path in plan.first} | {plan.last: RowwiseParallel()}
            parallelize_module(block, mesh, styles)
            continue
        if how == "by Linear":
            for path in (*plan.first, plan.last):
                fully_shard(block.get_submodule(path))
        fully_shard(block)
    if how != "parallel":
        fully_shard(new)
    for model in (old, new):
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        models.logits(model, given).square().mean().backward()
        optimizer.step()
    expected, found = (models.logits(model, given).detach() for model in (old, new))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert len(blocks(new)) == 2


def work(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    fully_sharded(by_linear=False)
    fully_sharded(by_linear=True)
    tensor_parallel()
    data_parallel()
    if find_spec("transformers"):
        for name in ("llama", "gpt2", "phi3", "bert", "vit"):
            for how in ("by layer", "by Linear", "parallel"):
                if (name, how) not in NOT_PARALLEL:
                    whole_model(name, how)
    torch.distributed.destroy_process_group()


def test_two_processes_compute_the_same_as_one(tmp_path: Path) -> None:
    mp.spawn(work, (str(tmp_path / "store"),), nprocs=2)
