"""The same block in other libraries: one builder each, which imports its library when called.

A builder raises ValueError with a short reason if its library does not have the block.
"""

import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.cases import Case
from benchmarks.plain import META, Contender, Weights, act_of, build_torch, loaded
from benchmarks.report import version

FLOAT8 = (8, 9)  # the lowest compute capability with 8-bit matmuls
HF_GATES = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_pytorch_tanh", "reglu": "relu"}
LIGER = {"swiglu": "LigerSwiGLUMLP", "geglu_tanh": "LigerGEGLUMLP"}
LIGER_TILED = {"swiglu": "LigerTiledSwiGLUMLP", "geglu_tanh": "LigerTiledGEGLUMLP"}
QUACK = {"swiglu": "swiglu", "geglu_tanh": "geglu", "reglu": "reglu", "glu": "glu"}
QUACK |= {"gelu_tanh": "gelu_tanh_approx", "silu": "silu", "relu": "relu", "relu2": "relu_sq"}


def require(served: bool, otherwise: str) -> None:
    if not served:
        raise ValueError(otherwise)


def require_gpu(weights: Weights) -> None:
    require(weights["up_proj.weight"].device.type != "cpu", "runs on GPUs")


def named(activation: str, names: dict[str, str]) -> str:
    """Return a library's name for this activation."""
    require(activation in names, f"has no {activation} block")
    return names[activation]


class Form(NamedTuple):
    """Convert weights to a library's layout, and gradients back."""

    pack: Callable[[Weights], Weights] = dict
    unpack: Callable[[Weights], Weights] = dict


def joined(join: Callable[[Tensor, Tensor], Tensor], part: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Form:
    """Join gate and up into one layer in the place of up; `part` splits gradients again."""

    def pack(weights: Weights) -> Weights:
        found = dict(weights)
        for kind in ("weight", "bias"):
            if (gate := found.pop(f"gate_proj.{kind}", None)) is not None:
                found[f"up_proj.{kind}"] = join(gate, found[f"up_proj.{kind}"])
        return found

    def unpack(weights: Weights) -> Weights:
        found = dict(weights)
        for kind in ("weight", "bias"):
            if (both := found.get(f"up_proj.{kind}")) is not None:
                found[f"gate_proj.{kind}"], found[f"up_proj.{kind}"] = part(both)
        return found

    return Form(pack, unpack)


def transpose(weights: Weights) -> Weights:
    return {name: w.t() for name, w in weights.items()}  # a bias stays unchanged


SPLIT = Form()
TRANSPOSED = Form(transpose, transpose)
GATE_LAST = joined(lambda gate, up: torch.cat([up, gate]), lambda both: both.chunk(2)[::-1])
BY_TURNS = joined(
    lambda gate, up: torch.stack([gate, up], 1).flatten(0, 1),
    lambda both: both.unflatten(0, (-1, 2)).unbind(1),
)


def renamed(weights: Weights, layers: dict[str, str]) -> Weights:
    parts = ((name.rpartition("."), w) for name, w in weights.items())
    return {f"{layers[layer]}.{kind}": w for (layer, _, kind), w in parts}


def adapted(
    module: nn.Module, weights: Weights, layers: dict[str, str], note: str, form: Form = SPLIT
) -> Contender:
    """`layers` maps Plain's layer names to the module's."""
    back = {theirs: ours for ours, theirs in layers.items()}
    state = renamed(form.pack(weights), layers)
    return loaded(module, state, lambda grads: form.unpack(renamed(grads, back)), note)


def build_encoder_layer(case: Case, weights: Weights) -> Contender:
    block = case.block
    require(not block.gated, "has no gated block")
    options = {"activation": act_of(block.activation), "bias": block.bias}
    with META:
        layer = nn.TransformerEncoderLayer(block.dim, 1, block.hidden_dim, case.dropout, **options)
    layer.self_attn = layer.norm1 = layer.norm2 = nn.Identity()
    layer.dropout2.p = 0.0
    layer.forward = layer._ff_block
    return adapted(layer, weights, {"up_proj": "linear1", "down_proj": "linear2"}, "")


def build_llama_mlp(case: Case, weights: Weights) -> Contender:
    block = case.block
    act = named(block.activation, HF_GATES)
    require(not case.dropout, "has no dropout")
    from transformers.models.llama.modeling_llama import LlamaMLP

    sizes = {"hidden_size": block.dim, "intermediate_size": block.hidden_dim}
    with META:
        module = LlamaMLP(SimpleNamespace(**sizes, hidden_act=act, mlp_bias=block.bias))
    return loaded(module, weights, note=version("transformers"))


def build_gpt2_mlp(case: Case, weights: Weights) -> Contender:
    block = case.block
    require(block.activation == "gelu_tanh", "GPT-2 has gelu_tanh")
    require(block.bias, "has a bias always")
    require(not case.dropout, "has its dropout behind the second product")
    from transformers.models.gpt2.modeling_gpt2 import GPT2MLP

    config = SimpleNamespace(hidden_size=block.dim, activation_function="gelu_new", resid_pdrop=0.0)
    with META:
        module = GPT2MLP(block.hidden_dim, config)
    layers = {"up_proj": "c_fc", "down_proj": "c_proj"}
    return adapted(module, weights, layers, version("transformers"), TRANSPOSED)


def build_x_transformers(case: Case, weights: Weights) -> Contender:
    block, act = case.block, act_of(case.block.activation)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", DeprecationWarning)
        from x_transformers.x_transformers import FeedForward

    mult = (block.hidden_dim + 0.5) / block.dim  # the library multiplies it by dim and rounds down
    options = {"glu": block.gated, "custom_activation": act, "no_bias": not block.bias}
    with META:
        module = FeedForward(block.dim, mult=mult, dropout=case.dropout, **options)
    note, up = version("x-transformers"), "ff.0.proj" if block.gated else "ff.0.0"
    if block.gated and not block.bias:
        module.ff[0].proj.bias = None
        note += ", less a bias that it has always"
    layers = {"up_proj": up, "down_proj": "ff.2"}
    return adapted(module, weights, layers, note, GATE_LAST if block.gated else SPLIT)


def build_timm(case: Case, weights: Weights) -> Contender:
    block, act = case.block, act_of(case.block.activation)
    from timm.layers import Mlp, SwiGLU

    kind = SwiGLU if block.gated else Mlp
    options = {"act_layer": lambda: act, "bias": block.bias, "drop": (case.dropout, 0.0)}
    with META:
        module = kind(block.dim, block.hidden_dim, **options)
    layers = {"up_proj": "fc1", "down_proj": "fc2"}
    if block.gated:
        layers |= {"up_proj": "fc1_x", "gate_proj": "fc1_g"}
    return adapted(module, weights, layers, version("timm"))


def build_liger(case: Case, weights: Weights, names: dict[str, str]) -> Contender:
    require_gpu(weights)
    block = case.block
    name = named(block.activation, names)
    require(not block.bias, "has no biases")
    require(not case.dropout, "has no dropout")
    from liger_kernel import transformers

    sizes = {"hidden_size": block.dim, "intermediate_size": block.hidden_dim}
    with META:
        module = getattr(transformers, name)(SimpleNamespace(**sizes, hidden_act=HF_GATES[block.activation]))
    return loaded(module, weights, note=version("liger-kernel"))


def build_liger_fused(case: Case, weights: Weights) -> Contender:
    require_gpu(weights)
    require(case.dtype != "autocast", "takes no part in autocast")
    contender = build_liger(case, weights, {"swiglu": "LigerMLP"})
    forward = contender.module.forward  # takes only (B, T, D)
    contender.module.forward = lambda x: forward(x[None]).squeeze(0)  # [0] would copy in backward
    return contender


def build_quack(case: Case, weights: Weights, tuned: bool) -> Contender:
    require_gpu(weights)
    block = case.block
    act = named(block.activation, QUACK)
    require(not case.dropout, "has no dropout")
    require(not case.trains or not block.bias, "falls back to torch where a bias is trained")
    require(block.dim % 8 == block.hidden_dim % 8 == 0, "falls back to torch unless 8 divides the widths")
    from quack.mlp import MLP

    options = {"activation": act, "bias1": block.bias, "bias2": block.bias, "tuned": tuned}
    with META:
        module = MLP(block.dim, block.hidden_dim, **options)
    layers = {"up_proj": "fc1", "down_proj": "fc2"}
    return adapted(module, weights, layers, version("quack-kernels"), BY_TURNS if block.gated else SPLIT)


def build_float8(case: Case, weights: Weights) -> Contender:
    """Build the compiled block, as torchao recommends: eager scales and casts are separate operations."""
    require_gpu(weights)
    require(case.work == "training", "is for training")
    capability = torch.cuda.get_device_capability(weights["up_proj.weight"].device)
    require(capability >= FLOAT8, f"wants a compute capability of {FLOAT8[0]}.{FLOAT8[1]}")
    from torchao.float8 import convert_to_float8_training

    contender = build_torch(case, weights)
    convert_to_float8_training(contender.module)
    contender.module.compile(dynamic=False)
    return contender._replace(note=f"{version('torchao')}, compiled")
