"""The baseline: a GPT in plain torch with nanoGPT's architecture, from stock modules.

It has pre-norm blocks of causal attention and a four times wider MLP, with erf GELU as in nanoGPT or tanh
GELU as in GPT-2, LayerNorm, learned positions, a head tied to the token embedding, GPT-2's initialisation and
a key/value cache. It has no fusion. Source: A. Radford et al., "Language Models are Unsupervised Multitask
Learners" (2019).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Cache:
    """The keys and values of one layer, in memory for `capacity` positions, written in place."""

    def __init__(self, capacity: int):
        self.capacity, self.length = capacity, 0
        self.memory: Tensor | None = None

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k and v (B, Q, T, C); return all keys and values so far, as views."""
        if self.memory is None:
            self.memory = k.new_empty(2, *k.shape[:2], self.capacity, k.shape[3])
        start, self.length = self.length, self.length + k.shape[2]
        self.memory[0, :, :, start : self.length] = k
        self.memory[1, :, :, start : self.length] = v
        return self.memory[0, :, :, : self.length], self.memory[1, :, :, : self.length]


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int, dropout: float, bias: bool):
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.c_attn = nn.Linear(dim, 3 * dim, bias=bias)
        self.c_proj = nn.Linear(dim, dim, bias=bias)
        self.out_dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        batch, time, dim = x.shape
        q, k, v = (
            part.view(batch, time, self.num_heads, -1).transpose(1, 2)
            for part in self.c_attn(x).split(dim, dim=-1)
        )
        if cache is not None:
            k, v = cache.append(k, v)
        rate = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=rate, is_causal=time > 1)
        return self.out_dropout(self.c_proj(y.transpose(1, 2).reshape(batch, time, dim)))


class MLP(nn.Module):
    def __init__(self, dim: int, dropout: float, bias: bool, gelu: str):
        super().__init__()
        self.c_fc = nn.Linear(dim, 4 * dim, bias=bias)
        self.act = nn.GELU(gelu)
        self.c_proj = nn.Linear(4 * dim, dim, bias=bias)
        self.out_dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_dropout(self.c_proj(self.act(self.c_fc(x))))


class Block(nn.Module):
    def __init__(self, dim: int, num_heads: int, dropout: float, bias: bool, gelu: str):
        super().__init__()
        self.norm_1 = nn.LayerNorm(dim, bias=bias)
        self.attention = Attention(dim, num_heads, dropout, bias)
        self.norm_2 = nn.LayerNorm(dim, bias=bias)
        self.mlp = MLP(dim, dropout, bias, gelu)

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        x = x + self.attention(self.norm_1(x), cache)
        return x + self.mlp(self.norm_2(x))


class GPT(nn.Module):
    """tokens (B, T) int64 -> logits (B, T, V); with targets (B, T), the mean cross entropy in nats.

    gelu: nn.GELU's `approximate`, "none" for erf.
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        num_layers: int,
        num_heads: int,
        max_seq_len: int,
        *,
        dropout: float = 0.0,
        bias: bool = True,
        gelu: str = "none",
    ):
        super().__init__()
        self.max_seq_len = max_seq_len
        self.tokens = nn.Embedding(vocab_size, dim)
        self.positions = nn.Embedding(max_seq_len, dim)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(dim, num_heads, dropout, bias, gelu) for _ in range(num_layers))
        self.norm = nn.LayerNorm(dim, bias=bias)
        self.head = nn.Linear(dim, vocab_size, bias=False)
        self.head.weight = self.tokens.weight
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                scale = math.sqrt(2 * num_layers) if name.endswith("c_proj.weight") else 1.0
                nn.init.normal_(parameter, std=0.02 / scale)

    def hidden(self, tokens: Tensor, caches: list[Cache] | None = None) -> Tensor:
        """With caches, tokens (B, T) continue the cached positions; T is 1 unless the caches are empty."""
        start = caches[0].length if caches else 0
        positions = torch.arange(start, start + tokens.shape[1], device=tokens.device)
        x = self.dropout(self.tokens(tokens) + self.positions(positions))
        for i, block in enumerate(self.blocks):
            x = block(x, caches[i] if caches else None)
        return self.norm(x)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        logits = self.head(self.hidden(tokens))
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    @torch.inference_mode()
    def generate(self, tokens: Tensor, max_new_tokens: int, *, cache: bool = True) -> Tensor:
        """Return the greedy continuation of tokens (B, T), within the window; without cache, every token runs
        the whole sequence again."""
        caches = [Cache(tokens.shape[1] + max_new_tokens) for _ in self.blocks] if cache else None
        new = tokens
        for _ in range(max_new_tokens):
            chosen = self.head(self.hidden(new, caches)[:, -1]).argmax(dim=-1, keepdim=True)
            tokens = torch.cat([tokens, chosen], dim=1)
            new = chosen if cache else tokens
        return tokens

    def parameter_groups(self, weight_decay: float) -> list[dict]:
        """Build AdamW with weight decay for matrices and embeddings, none for biases and norms."""
        matrices = [p for p in self.parameters() if p.dim() >= 2]
        vectors = [p for p in self.parameters() if p.dim() < 2]
        return [
            {"params": matrices, "weight_decay": weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
