"""timm's blocks by their names, ours or the originals, and their formula written out."""

import pytest
import torch
from torch import Tensor, nn

import ffn.interop.timm as page
from tests.interop.swap.same import F64

names = pytest.mark.parametrize("name", ["Mlp", "GluMlp", "SwiGLU", "SwiGLUPacked"])
SIZES = {"in_features": 6, "hidden_features": 10, "out_features": 5, "dtype": F64}


def build(name: str, home=page, **options) -> nn.Module:
    block = getattr(home, name)(**{**SIZES, **options})
    for child in block.children():  # an activation with a weight of its own gets no dtype from timm
        child.to(SIZES["dtype"])
    return block


def written_out(block: nn.Module, x: Tensor) -> Tensor:
    """The block's formula, from its weights and activation, without its forward and dropouts."""
    if hasattr(block, "fc1_g"):
        h = block.act(block.fc1_g(x)) * block.fc1_x(x)
    elif hasattr(block, "gate_last"):
        a, b = block.fc1(x).tensor_split(2, -1)
        h = a * block.act(b) if block.gate_last else block.act(a) * b
    else:
        h = block.act(block.fc1(x))
    return block.fc2(block.norm(h))


def rows() -> Tensor:
    return torch.randn(2, 3, 6, dtype=F64)
