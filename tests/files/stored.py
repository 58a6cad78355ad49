"""Tensors of many dtypes, written as one file or several, to compare with the tensors read back."""

from pathlib import Path

import torch
from torch import Tensor

from ffn.files.shards import Shards, write_shards

TENSORS = {
    "a.weight": torch.arange(6, dtype=torch.float32).view(2, 3),
    "b": torch.tensor(0.5, dtype=torch.bfloat16),
    "c": torch.zeros(0, 4, dtype=torch.float16),
    "d": torch.arange(3),
    "e": torch.tensor([True, False, True]),
    "f": torch.arange(4, dtype=torch.float64),
}


def write(folder: Path, tensors: dict[str, Tensor] = TENSORS, max_shard_bytes: int = 10**9) -> None:
    folder.mkdir(exist_ok=True)
    sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
    write_shards(folder, sizes, tensors.__getitem__, max_shard_bytes=max_shard_bytes)


def assert_same(shards: Shards, tensors: dict[str, Tensor] = TENSORS) -> None:
    assert set(shards) == set(shards.specs) == set(tensors)
    assert len(shards) == len(tensors)
    for name, tensor in shards.items():
        assert (tensor.dtype, tensor.shape) == (tensors[name].dtype, tensors[name].shape)
        assert shards.specs[name][1:] == (tensor.dtype, tuple(tensor.shape))
        assert torch.equal(tensor, tensors[name])
