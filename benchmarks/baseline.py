"""The plain-torch GPT that everything is measured beside: nanoGPT's architecture from stock modules.

What it is: pre-norm blocks of causal attention and a four-times-wider erf-GELU MLP, LayerNorm, learned
positions, a head tied to the token embedding, and GPT-2's initialisation. What it is not: clever. No fusion,
no cache. Source: A. Radford et al., "Language Models are Unsupervised Multitask Learners" (2019).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int, dropout: float, bias: bool):
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.c_attn = nn.Linear(dim, 3 * dim, bias=bias)
        self.c_proj = nn.Linear(dim, dim, bias=bias)
        self.out_dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, dim = x.shape
        q, k, v = (
            part.view(batch, time, self.num_heads, -1).transpose(1, 2)
            for part in self.c_attn(x).split(dim, dim=-1)
        )
        rate = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=rate, is_causal=True)
        return self.out_dropout(self.c_proj(y.transpose(1, 2).reshape(batch, time, dim)))


class MLP(nn.Module):
    def __init__(self, dim: int, dropout: float, bias: bool):
        super().__init__()
        self.c_fc = nn.Linear(dim, 4 * dim, bias=bias)
        self.act = nn.GELU()
        self.c_proj = nn.Linear(4 * dim, dim, bias=bias)
        self.out_dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_dropout(self.c_proj(self.act(self.c_fc(x))))


class Block(nn.Module):
    def __init__(self, dim: int, num_heads: int, dropout: float, bias: bool):
        super().__init__()
        self.norm_1 = nn.LayerNorm(dim, bias=bias)
        self.attention = Attention(dim, num_heads, dropout, bias)
        self.norm_2 = nn.LayerNorm(dim, bias=bias)
        self.mlp = MLP(dim, dropout, bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm_1(x))
        return x + self.mlp(self.norm_2(x))


class GPT(nn.Module):
    """tokens (B, T) int64 -> logits (B, T, V), or with targets (B, T) the mean cross entropy in nats."""

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
    ):
        super().__init__()
        self.max_seq_len = max_seq_len
        self.tokens = nn.Embedding(vocab_size, dim)
        self.positions = nn.Embedding(max_seq_len, dim)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(dim, num_heads, dropout, bias) for _ in range(num_layers))
        self.norm = nn.LayerNorm(dim, bias=bias)
        self.head = nn.Linear(dim, vocab_size, bias=False)
        self.head.weight = self.tokens.weight
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                scale = math.sqrt(2 * num_layers) if name.endswith("c_proj.weight") else 1.0
                nn.init.normal_(parameter, std=0.02 / scale)

    def hidden(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.dropout(self.tokens(tokens) + self.positions(positions))
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        logits = self.head(self.hidden(tokens))
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def generate(self, tokens: Tensor, max_new_tokens: int) -> Tensor:
        """The greedy continuation of tokens (B, T), the whole window run again for each new token."""
        for _ in range(max_new_tokens):
            last = self.hidden(tokens[:, -self.max_seq_len :])[:, -1]
            tokens = torch.cat([tokens, self.head(last).argmax(dim=-1, keepdim=True)], dim=1)
        return tokens

    def parameter_groups(self, weight_decay: float) -> list[dict]:
        """Decay for matrices and embeddings, none for biases and norms."""
        matrices = [p for p in self.parameters() if p.dim() >= 2]
        vectors = [p for p in self.parameters() if p.dim() < 2]
        return [
            {"params": matrices, "weight_decay": weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
