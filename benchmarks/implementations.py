"""The implementations: one builder each, all from the same weights.

A builder raises ValueError if it does not have the block, and ImportError if its library is absent; the row
then has the reason as its note.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch

from benchmarks import peers
from benchmarks.cases import Case
from benchmarks.plain import META, Contender, Weights, build_compiled, build_torch, loaded

if TYPE_CHECKING:  # absent from older commits, which `base` measures
    from ffn.ops.kernels.tilings import Tiling

__all__ = ["IMPLEMENTATIONS", "Contender", "Weights", "always", "never", "pinned"]


@contextmanager
def pinned(choose: Callable[..., "Tiling | None"]) -> Iterator[None]:
    """Context: `choose` replaces the table in deciding which matmuls ffn's kernels fuse."""
    from ffn.ops.kernels import tilings

    kept = tilings.choose
    tilings.choose = choose
    try:
        yield
    finally:
        tilings.choose = kept


def never(*key) -> None:
    """Fuse no matmul."""


def always(
    forward: bool, capability: tuple[int, int], dtype: str, gated: bool, *sizes: int
) -> "Tiling | None":
    """Fuse both products, in the first of the candidate tiles."""
    from benchmarks.tiles import CANDIDATES

    return CANDIDATES[forward, gated][0]


def build_ffn(case: Case, weights: Weights, *, save: str = "preact", backend: str = "auto") -> Contender:
    from ffn import FeedForward

    block, x = case.block, weights["up_proj.weight"]
    options = {"activation": block.activation, "bias": block.bias, "save": save, "backend": backend}
    module = FeedForward(block.dim, block.hidden_dim, case.dropout, **options, device=META)
    contender = loaded(module, weights)
    with case.autocast(x.device):
        backend = module.explain(x).partition(":")[0]
    return contender._replace(note=f"backend {backend}")


def build_ffn_compiled(case: Case, weights: Weights) -> Contender:
    contender = build_ffn(case, weights)
    contender.module.compile(dynamic=False)
    return contender._replace(note=f"{contender.note}, compiled")


def build_pinned(case: Case, weights: Weights, choose: Callable[..., "Tiling | None"]) -> Contender:
    peers.require_gpu(weights)
    from benchmarks.tiles import CAPABILITIES

    known = torch.cuda.get_device_capability()[0] in CAPABILITIES
    peers.require(known, "has no tiles for this GPU")
    return build_ffn(case, weights)._replace(setting=partial(pinned, choose))


def build_packed(case: Case, weights: Weights, form: str) -> Contender:
    x = weights["up_proj.weight"]
    peers.require(x.device.type == "cpu", "runs on CPUs")
    peers.require(not case.trains, "is for inference")
    peers.require(case.dtype != "autocast", "takes no part in autocast")
    from ffn import pack

    contender = build_ffn(case, weights)
    module = pack(contender.module.eval(), form)
    with torch.no_grad():
        backend = module.explain(x).partition(":")[0]
    return contender._replace(note=f"backend {backend}")


IMPLEMENTATIONS: dict[str, Callable[[Case, Weights], Contender]] = {
    "torch": build_torch,
    "torch.compile": build_compiled,
    "torch max-autotune": partial(build_compiled, mode="max-autotune-no-cudagraphs"),
    "TransformerEncoderLayer": peers.build_encoder_layer,
    "hf LlamaMLP": peers.build_llama_mlp,
    "hf GPT2MLP": peers.build_gpt2_mlp,
    "x-transformers": peers.build_x_transformers,
    "timm": peers.build_timm,
    "liger": partial(peers.build_liger, names=peers.LIGER),
    "liger fused": peers.build_liger_fused,
    "liger tiled": partial(peers.build_liger, names=peers.LIGER_TILED),
    "quack": partial(peers.build_quack, tuned=False),
    "quack tuned": partial(peers.build_quack, tuned=True),
    "torchao float8": peers.build_float8,
    "ffn": build_ffn,
    "ffn compiled": build_ffn_compiled,
    "ffn eager": partial(build_ffn, backend="eager"),
    "ffn triton": partial(build_ffn, backend="triton"),
    "ffn save=input": partial(build_ffn, save="input"),
    "ffn fused": partial(build_pinned, choose=always),
    "ffn unfused": partial(build_pinned, choose=never),
    "ffn packed": partial(build_packed, form="float"),
    "ffn int8": partial(build_packed, form="int8"),
}
