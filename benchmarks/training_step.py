"""A whole training step (forward, loss, backward, AdamW): ffn beside the plain GPT of the same sizes.

python -m benchmarks training_step                       both shapes, dropout 0 and 0.1, float32
python -m benchmarks training_step --shapes tiny --rounds 5

Dropout sits where nanoGPT has it: embeddings, attention weights, and the outputs of attention and MLP.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.baseline import GPT
from benchmarks.report import arguments, publish
from benchmarks.timing import comparison, measure, saved_bytes

COLUMNS = ["shape", "batch", "mode", "dropout", "implementation", "parameters"]
COLUMNS += ["ms", "iqr", "speedup", "low", "high", "saved_MB", "saved_ratio"]


class Shape(NamedTuple):
    vocab_size: int
    dim: int
    num_layers: int
    num_heads: int
    max_seq_len: int
    batch: int


SHAPES = {
    "tiny": Shape(65, 128, 4, 4, 64, batch=12),  # nanoGPT's recipe for a CPU
    "small": Shape(65, 384, 6, 6, 256, batch=8),  # its character model, in batches that two cores bear
}


class Step(NamedTuple):
    """A model, its loss on one fixed batch, and everything a step of training does."""

    model: nn.Module
    loss: Callable[[], Tensor]
    run: Callable[[], object]


def build_torch(shape: Shape, dropout: float) -> nn.Module:
    return GPT(*shape[:5], dropout=dropout)


def build_ffn(shape: Shape, dropout: float) -> nn.Module:
    from ffn import Transformer, TransformerConfig

    config = TransformerConfig(
        vocab_size=shape.vocab_size,
        dim=shape.dim,
        num_layers=shape.num_layers,
        num_heads=shape.num_heads,
        hidden_dim=4 * shape.dim,
        max_seq_len=shape.max_seq_len,
        activation="gelu",
        bias=True,
        attention_bias=True,
        position="learned",
        norm="layernorm",
        dropout=dropout,
        attention_dropout=dropout,
    )
    return Transformer(config)


IMPLEMENTATIONS = {"torch": build_torch, "ffn": build_ffn}


def make_step(name: str, shape: Shape, dropout: float, mode: str) -> Step:
    torch.manual_seed(0)
    model = IMPLEMENTATIONS[name](shape, dropout).train()
    tokens = torch.randint(shape.vocab_size, (shape.batch, shape.max_seq_len + 1))
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1)

    def loss() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16) if mode == "autocast" else nullcontext():
            return model(inputs, targets) if name == "torch" else model.loss(inputs, targets)

    def run() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return Step(model, loss, run)


def run_case(shape_name: str, dropout: float, mode: str, rounds: int) -> list[dict]:
    shape = SHAPES[shape_name]
    steps = {name: make_step(name, shape, dropout, mode) for name in IMPLEMENTATIONS}
    seconds = measure({name: step.run for name, step in steps.items()}, rounds=rounds)
    kept = {name: saved_bytes(step.loss, step.model) for name, step in steps.items()}
    rows = []
    for name, step in steps.items():
        row = {"shape": shape_name, "batch": shape.batch, "mode": mode, "dropout": dropout}
        row |= {"implementation": name, "parameters": sum(p.numel() for p in step.model.parameters())}
        row |= comparison(seconds["torch"], seconds[name])
        rows.append(row | {"saved_MB": kept[name] / 1e6, "saved_ratio": kept[name] / kept["torch"]})
    return rows


def main(argv: list[str]) -> None:
    parser = arguments("training_step", __doc__)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--modes", nargs="+", choices=("float32", "autocast"), default=["float32"])
    parser.add_argument("--dropout", nargs="+", type=float, default=[0.0, 0.1])
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args(argv)
    rows = []
    for shape in options.shapes:
        for mode in options.modes:
            for dropout in options.dropout:
                rows += run_case(shape, dropout, mode, options.rounds)
    publish("training_step", rows, COLUMNS, options.results)
