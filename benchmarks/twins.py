"""The same GPT with the same weights in plain torch, transformers and ffn.

Weights are named as in `baseline.GPT`. transformers is built from its published GPT2Config, which names tanh
GELU `gelu_new`; it uses its default cache and attention.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

import ffn
from benchmarks.baseline import GPT
from benchmarks.report import version
from ffn import Transformer, TransformerConfig

Weights = dict[str, Tensor]
Tokens = Sequence[Sequence[int]] | Tensor


class Shape(NamedTuple):
    vocab_size: int
    dim: int
    num_layers: int
    num_heads: int
    max_seq_len: int
    batch: int  # rows of a training step
    activation: str


SHAPES = {
    "tiny": Shape(65, 128, 4, 4, 64, 12, "gelu"),  # nanoGPT's recipe for a CPU
    "small": Shape(65, 384, 6, 6, 256, 8, "gelu"),  # its character model, in batches for two cores
    "gpt2": Shape(50257, 768, 12, 12, 1024, 8, "gelu_tanh"),  # GPT-2 small, Radford et al. 2019
}


class Twin(NamedTuple):
    """A model with its functions of tokens (B, T).

    generate: the greedy continuation; returns the new tokens only.
    """

    model: nn.Module
    table: Tensor  # the token embedding
    logits: Callable[[Tensor], Tensor]
    loss: Callable[[Tensor, Tensor], Tensor]
    generate: Callable[[Tensor, int], Tokens]
    parameters: int
    note: str = ""


def plain(shape: Shape, dropout: float) -> GPT:
    gelu = "tanh" if shape.activation == "gelu_tanh" else "none"
    return GPT(*shape[:5], dropout=dropout, gelu=gelu)


def draw(shape: Shape, device: torch.device) -> Weights:
    """Initialise as GPT-2, but with biases and norms off 0 and 1, so that a forgotten weight is noticed."""
    torch.manual_seed(0)
    weights = plain(shape, 0.0).state_dict()
    for weight in weights.values():
        if weight.ndim == 1:
            weight.add_(torch.randn_like(weight), alpha=0.02)
    return {name: weight.to(device) for name, weight in weights.items()}


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def build_torch(shape: Shape, dropout: float, weights: Weights, dtype: torch.dtype) -> Twin:
    table = weights["tokens.weight"]
    model = plain(shape, dropout).to(table.device, dtype)
    model.load_state_dict(weights)

    def generate(prompt: Tensor, new_tokens: int) -> Tensor:
        return model.generate(prompt, new_tokens)[:, prompt.shape[1] :]

    return Twin(model, model.tokens.weight, model, model, generate, count(model))


TRANSFORMERS = (
    ("tokens.", "transformer.wte."),
    ("positions.", "transformer.wpe."),
    ("blocks.", "transformer.h."),
    (".attention.", ".attn."),
    (".norm_", ".ln_"),
    ("norm.", "transformer.ln_f."),
    ("head.", "lm_head."),
)
FFN = (
    ("tokens.", "embedding.token."),
    ("positions.", "embedding.position."),
    ("norm_1.", "attention_norm."),
    ("norm_2.", "feed_forward_norm."),
    ("attention.c_proj.", "attention.o_proj."),
    ("mlp.c_fc.", "feed_forward.up_proj."),
    ("mlp.c_proj.", "feed_forward.down_proj."),
)


def renamed(name: str, parts: tuple[tuple[str, str], ...]) -> str:
    for theirs, ours in parts:
        name = name.replace(theirs, ours)
    return name


def for_transformers(weights: Weights) -> Weights:
    """Transpose the matrices for transformers' Conv1D."""
    turned = {name: w.t() if ".c_" in name and w.ndim == 2 else w for name, w in weights.items()}
    return {renamed(name, TRANSFORMERS): w for name, w in turned.items()}


def build_transformers(shape: Shape, dropout: float, weights: Weights, dtype: torch.dtype) -> Twin:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=shape.vocab_size,
        n_embd=shape.dim,
        n_layer=shape.num_layers,
        n_head=shape.num_heads,
        n_positions=shape.max_seq_len,
        activation_function={"gelu": "gelu", "gelu_tanh": "gelu_new"}[shape.activation],
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        resid_pdrop=dropout,
        bos_token_id=None,
        eos_token_id=None,  # random weights may choose any token; generation must not stop early
    )
    model = GPT2LMHeadModel(config).to(weights["tokens.weight"].device, dtype)
    model.load_state_dict(for_transformers(weights))

    def logits(tokens: Tensor) -> Tensor:
        return model(tokens, use_cache=False).logits

    def loss(tokens: Tensor, targets: Tensor) -> Tensor:
        # transformers' own shift would leave out the last token
        return model(tokens, use_cache=False, labels=targets, shift_labels=targets).loss

    def generate(prompt: Tensor, new_tokens: int) -> Tensor:
        mask = torch.ones_like(prompt)
        out = model.generate(prompt, attention_mask=mask, do_sample=False, max_new_tokens=new_tokens)
        return out[:, prompt.shape[1] :]

    table = model.transformer.wte.weight
    return Twin(model, table, logits, loss, generate, count(model), version("transformers"))


def for_ffn(weights: Weights) -> Weights:
    """Split queries, keys and values; the tied head owns no weight."""
    found = {renamed(name, FFN): w for name, w in weights.items() if name != "head.weight"}
    for name in [name for name in found if ".c_attn." in name]:
        thirds = zip("qkv", found.pop(name).chunk(3), strict=True)
        found |= {name.replace("c_attn", f"{letter}_proj"): third for letter, third in thirds}
    return found


def config_of(shape: Shape, dropout: float) -> TransformerConfig:
    return TransformerConfig(
        vocab_size=shape.vocab_size,
        dim=shape.dim,
        num_layers=shape.num_layers,
        num_heads=shape.num_heads,
        hidden_dim=4 * shape.dim,
        max_seq_len=shape.max_seq_len,
        activation=shape.activation,
        bias=True,
        attention_bias=True,
        position="learned",
        norm="layernorm",
        dropout=dropout,
        attention_dropout=dropout,
    )


def build_ffn(shape: Shape, dropout: float, weights: Weights, dtype: torch.dtype) -> Twin:
    config, device = config_of(shape, dropout), weights["tokens.weight"].device
    model = Transformer(config, device=device, dtype=dtype)
    model.load_state_dict(for_ffn(weights))

    def continued(prompt: Tensor, new_tokens: int) -> list[list[int]]:
        return ffn.generate(model, prompt, new_tokens, temperature=0.0)

    return Twin(model, model.embedding.weight, model, model.loss, continued, model.num_parameters())


def build_ffn_packed(shape: Shape, dropout: float, weights: Weights, dtype: torch.dtype) -> Twin:
    twin = build_ffn(shape, dropout, weights, dtype)
    ffn.pack(twin.model)
    return twin._replace(note="packed before all calls")


def build_ffn_int8(shape: Shape, dropout: float, weights: Weights, dtype: torch.dtype) -> Twin:
    twin = build_ffn(shape, dropout, weights, dtype)
    ffn.pack(twin.model, form="int8")
    return twin._replace(note="packed before all calls")


Build = Callable[[Shape, float, Weights, torch.dtype], Twin]
TRAINING: dict[str, Build] = {"torch": build_torch, "transformers": build_transformers, "ffn": build_ffn}
GENERATION = TRAINING | {"ffn packed": build_ffn_packed, "ffn int8": build_ffn_int8}
