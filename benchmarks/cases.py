"""The cases: feed-forward blocks of real models with tokens, dtype, work and dropout."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from ffn import activations

WARM = "warm-inference"  # repeated, so that weights that fit the cache stay there
DTYPES = ("float32", "bfloat16", "autocast")  # autocast: float32 weights and input under bfloat16 autocast
WORKS = ("training", "inference", WARM)  # forward and backward; forward without gradients; the same repeated
BASELINE, CEILING = "torch", "ceiling"  # the reference for speedups; the bare matmuls of the machine
WRONG = {"float32": 1e-5, "bfloat16": 2e-2, "autocast": 2e-2}  # relative errors larger than any rounding
# Implementations with larger rounding errors. float8's worst gradient has an error of 0.093 even when
# emulated on a CPU, which sums more exactly.
EIGHT_BITS = {"torchao float8": 0.15, "ffn int8": 0.1}


@dataclass(frozen=True)
class Block:
    """The sizes of a model's feed-forward block: width D, hidden width H."""

    name: str
    dim: int
    hidden_dim: int
    activation: str
    bias: bool
    source: str

    @property
    def gated(self) -> bool:
        return activations.TABLE[self.activation].gated

    @property
    def weights(self) -> int:
        """Number of elements of the weight matrices."""
        return (2 + self.gated) * self.dim * self.hidden_dim


_GPT2 = "Radford et al. 2019, and n_embd of the published config.json"
_BLOCKS = (
    Block("small", 256, 1024, "gelu", True, "none: a character model of a few million parameters"),
    Block("minilm", 384, 1536, "gelu", True, "Wang et al. 2020, MiniLM-L6-H384"),
    Block("bert-base", 768, 3072, "gelu", True, "Devlin et al. 2018"),
    Block("vit-b16", 768, 3072, "gelu", True, "Dosovitskiy et al. 2020, ViT-B/16"),
    Block("gpt2", 768, 3072, "gelu_tanh", True, _GPT2),
    Block("gpt2-medium", 1024, 4096, "gelu_tanh", True, _GPT2),
    Block("gpt2-large", 1280, 5120, "gelu_tanh", True, _GPT2),
    Block("gpt2-xl", 1600, 6400, "gelu_tanh", True, _GPT2),
    Block("qwen2.5-0.5b", 896, 4864, "swiglu", False, "Qwen team 2024, config.json of Qwen2.5-0.5B"),
    Block("tinyllama-1.1b", 2048, 5632, "swiglu", False, "Zhang et al. 2024, config.json of TinyLlama-1.1B"),
    Block("gemma-2b", 2048, 16384, "geglu_tanh", False, "Gemma team 2024, config.json of gemma-2b"),
    Block("llama-2-7b", 4096, 11008, "swiglu", False, "Touvron et al. 2023"),
    Block("llama-3-8b", 4096, 14336, "swiglu", False, "Llama team 2024"),
)
BLOCKS = {block.name: block for block in _BLOCKS}


@dataclass(frozen=True)
class Case:
    """A block with tokens, dtype, work and dropout."""

    block: Block
    tokens: int
    dtype: str = "float32"
    work: str = "training"
    dropout: float = 0.0

    @property
    def element(self) -> torch.dtype:
        """The dtype of weights and input."""
        return torch.bfloat16 if self.dtype == "bfloat16" else torch.float32

    @property
    def trains(self) -> bool:
        return self.work == "training"

    @property
    def flops(self) -> int:
        """FLOPs of the matmuls: two per weight and token, once in forward and twice in backward."""
        return (6 if self.trains else 2) * self.tokens * self.block.weights

    def autocast(self, device: torch.device) -> AbstractContextManager:
        return torch.autocast(device.type, torch.bfloat16) if self.dtype == "autocast" else nullcontext()

    def columns(self) -> dict[str, object]:
        """The columns that identify the case in a row."""
        about = {"block": self.block.name, "tokens": self.tokens, "dtype": self.dtype}
        return about | {"work": self.work, "dropout": self.dropout}

    def __str__(self) -> str:
        dropout = f" dropout {self.dropout}" if self.dropout else ""
        return f"{self.block.name} {self.tokens} {self.dtype} {self.work}{dropout}"
