"""The kernels in CUDA graphs, torch.compile, autocast, checkpointing, other devices and fresh processes."""

import copy
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ffn import FeedForward
from ffn.ops.feed_forward import feed_forward
from tests.conftest import ROOT
from tests.gpu.compare import assert_alike, assert_equal, check, results, sample

BF16 = torch.bfloat16
quiet = pytest.mark.filterwarnings("ignore")  # each version of the compiler has other warnings


def mirror(device: torch.device) -> FeedForward:
    """Return a block that outputs its input with half of the elements dropped."""
    block = FeedForward(128, 128, 0.5, activation="identity", bias=False, dtype=BF16, device=device)
    with torch.no_grad():
        block.up_proj.weight.copy_(torch.eye(128))
        block.down_proj.weight.copy_(torch.eye(128))
    return block


def masks(call: Callable[[Tensor], Tensor], device: torch.device) -> list[Tensor]:
    """Return the masks that a mirror applied forward and backward."""
    x = torch.ones(256, 128, dtype=BF16, device=device, requires_grad=True)
    y = call(x)
    return [y.detach(), torch.autograd.grad(y, x, torch.ones_like(y))[0]]


def assert_one_mask(y: Tensor, dx: Tensor) -> None:
    assert set(y.unique().tolist()) == {0.0, 2.0}
    assert 0.45 < (y == 0.0).float().mean() < 0.55
    assert torch.equal(dx, y)


def captured(run: Callable[[], list[Tensor]]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    """Return a warmed-up CUDA graph of run, and the tensors that its replays write."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = [t.detach() for t in run()]  # autograd's graph must not outlive the capturing stream
    return graph, found


@pytest.mark.parametrize("name", ["gelu", "swiglu"])
@pytest.mark.parametrize("tokens", [300, 16], ids=["training", "decoding"])
def test_cuda_graph_replays(device: torch.device, name: str, tokens: int) -> None:
    arguments, dy = sample(name, device, BF16, (tokens,)), torch.randn(tokens, 256, device=device)
    with torch.set_grad_enabled(tokens > 32):
        run = partial(results, partial(feed_forward, activation=name), arguments, dy)
        graph, found = captured(run)
        for _ in range(2):
            with torch.no_grad():
                arguments.x.copy_(torch.randn_like(arguments.x))
            graph.replay()
            assert_alike(found, run())


def test_cuda_graph_draws_a_new_mask_per_replay(device: torch.device) -> None:
    graph, found = captured(partial(masks, mirror(device), device))
    drawn = []
    for _ in range(2):
        graph.replay()
        assert_one_mask(*found)
        drawn.append(found[0].clone())
    assert not torch.equal(*drawn)


def block_and_tokens(device: torch.device, count: int, **options) -> tuple[FeedForward, Tensor]:
    block = FeedForward(256, 1024, activation="swiglu", device=device, **options)
    x = torch.randn(count, 256, dtype=block.up_proj.weight.dtype, device=device, requires_grad=True)
    return block, x


def outcome(call: Callable[[Tensor], Tensor], block: FeedForward, x: Tensor) -> list[Tensor]:
    y = call(x)
    return [y, *torch.autograd.grad(y.square().sum(), [x, *block.parameters()])]


@quiet
def test_one_dynamic_compile_serves_all_token_counts(device: torch.device) -> None:
    torch._dynamo.reset()
    block, x = block_and_tokens(device, 1000, dtype=BF16)
    call = torch.compile(block, fullgraph=True, dynamic=True)
    outcome(call, block, x)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for count in range(2, 1000, 50):
            x = torch.randn(count, 256, dtype=BF16, device=device, requires_grad=True)
            assert_alike(outcome(call, block, x), outcome(block, block, x))


@quiet
def test_static_compile_has_one_mask_both_ways(device: torch.device) -> None:
    torch._dynamo.reset()
    call = torch.compile(mirror(device), fullgraph=True, dynamic=False)
    first, second = masks(call, device), masks(call, device)
    assert_one_mask(*first)
    assert_one_mask(*second)
    assert not torch.equal(first[0], second[0])


@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
def test_autocast_equals_manual_casts(device: torch.device, dtype: torch.dtype) -> None:
    block, x = block_and_tokens(device, 300, dropout=0.1)
    assert block.explain(x).startswith("triton: ")
    lower = copy.deepcopy(block).to(dtype)
    torch.manual_seed(1)
    with torch.autocast(device.type, dtype):
        y = block(x)
    torch.manual_seed(1)
    by_hand = lower(x.to(dtype))
    dy = torch.randn_like(y)
    ours = torch.autograd.grad(y, [x, *block.parameters()], dy)
    theirs = torch.autograd.grad(by_hand, [x, *lower.parameters()], dy)
    assert_equal([y, *ours], [by_hand, *(t.float() for t in theirs)])


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "saved_tensors"])
def test_activation_checkpointing_repeats_the_mask(device: torch.device, reentrant: bool) -> None:
    block, x = block_and_tokens(device, 300, dropout=0.1, dtype=BF16)
    runs = []
    for call in (block, partial(checkpoint, block, use_reentrant=reentrant)):
        leaves = [x, *block.parameters()]
        for t in leaves:
            t.grad = None
        torch.manual_seed(1)
        y = call(x)
        y.square().sum().backward()
        runs.append([y, *(t.grad for t in leaves)])
    assert_equal(*runs)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_device_other_than_the_current_one() -> None:
    for dtype in (torch.float32, BF16):
        check("swiglu", sample("swiglu", torch.device("cuda", 1), dtype), 0.1)


PASSES = """
import torch
from ffn.ops.feed_forward import feed_forward
from ffn.ops.kernels import tilings
from tests.gpu.compare import FUSED, ODD, fuse_large, results, sample
tilings.choose = fuse_large
device = torch.device("cuda")
for name in ("gelu", "swiglu"):
    for case in (FUSED, ODD):
        arguments = sample(name, device, torch.bfloat16, *case)
        dy = torch.randn(*case[0], case[1][2], device=device)
        found = results(lambda *a: feed_forward(*a, activation=name, dropout=0.1), arguments, dy)
        with torch.no_grad():
            found.append(feed_forward(arguments.x[:17], *arguments[1:], activation=name))
        assert all(t.isfinite().all() for t in found)
"""
SANITIZER = ["compute-sanitizer", "--report-api-errors", "no", "--error-exitcode", "9"]


@pytest.mark.parametrize("watcher", [[], SANITIZER], ids=["alone", "memory_checked"])
def test_fresh_process(monkeypatch: pytest.MonkeyPatch, watcher: list[str]) -> None:
    """The first kernel in autograd's thread is ours. Tensors are allocated apart, to detect overruns."""
    if watcher and shutil.which(watcher[0]) is None:
        pytest.skip(f"{watcher[0]} is not on PATH")
    monkeypatch.setenv("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")
    command = [*watcher, sys.executable, "-c", PASSES]
    limit = 100 if watcher else None  # seconds
    try:
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        pytest.skip("compute-sanitizer needs more than 100 s here")
    if watcher and "Device not supported" in run.stdout + run.stderr:
        pytest.skip("compute-sanitizer does not support this device")
    assert run.returncode == 0, run.stdout + run.stderr
