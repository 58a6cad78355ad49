"""The embedding: tokens, token types and positions to vectors."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ffn.ops.dropout import dropout


class Embedding(nn.Module):
    """Token embedding, with optional token types, learned positions, norm and dropout.

        dropout(norm(scale * token[t] + token_type[k] + position[offset + p]))

    Args:
        vocab_size: V, number of rows of `token`.
        dim: D.
        max_seq_len: number of learned positions; None for no `position` table.
        dropout: probability of dropping a value in training.
        position_offset: number of rows of `position` before position 0.
        num_token_types: number of rows of `token_type`; 0 for no table.
        scale: factor on the token's row.
        norm: builds a norm over D; None for no norm.

    Shape:
        tokens (B, T) int64 or int32, positions (T) or (B, T) int64 -> (B, T, D).
        token_types: like tokens; all 0 by default.

    Raises:
        ValueError: if an index is outside its table (on the CPU; a GPU raises its own assertion), or
            token_types are given without a table.
        TypeError: if tokens are not integers.
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        max_seq_len: int | None = None,
        *,
        dropout: float = 0.0,
        position_offset: int = 0,
        num_token_types: int = 0,
        scale: float = 1.0,
        norm: Callable[[], nn.Module] | None = None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.dropout, self.scale, self.position_offset = dropout, scale, position_offset
        self.token = nn.Embedding(vocab_size, dim, device=device, dtype=dtype)
        self.position = None
        if max_seq_len is not None:
            self.position = nn.Embedding(position_offset + max_seq_len, dim, device=device, dtype=dtype)
        self.token_type = None
        if num_token_types:
            self.token_type = nn.Embedding(num_token_types, dim, device=device, dtype=dtype)
        self.norm = None if norm is None else norm()

    @property
    def weight(self) -> Tensor:
        """The token table (V, D); a tied head reads it too."""
        return self.token.weight

    def forward(
        self, tokens: Tensor, positions: Tensor | None = None, token_types: Tensor | None = None
    ) -> Tensor:
        if tokens.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"tokens must be int64 or int32, got {tokens.dtype}; cast with .long()")
        x = _look_up(self.token, tokens, "tokens")
        if self.scale != 1.0:
            x = x * torch.full(
                (), self.scale, dtype=x.dtype, device=x.device
            )  # rounded to the weights' dtype
        if self.token_type is not None:
            types = torch.zeros_like(tokens) if token_types is None else token_types
            x = x + _look_up(self.token_type, types, "token_types")
        elif token_types is not None:
            raise ValueError("token_types must be None: this embedding has no token types")
        if self.position is not None:
            if positions is None:
                positions = torch.arange(tokens.shape[-1], device=tokens.device)
            if self.position_offset:
                positions = positions + self.position_offset
            x = x + _look_up(self.position, positions, "positions")
        if self.norm is not None:
            x = self.norm(x)
        return dropout(x, self.dropout, self.training)

    def extra_repr(self) -> str:
        return f"dropout={self.dropout}" if self.dropout else ""


def _look_up(table: nn.Embedding, index: Tensor, name: str) -> Tensor:
    try:
        return table(index)
    except IndexError:
        low, high = int(index.min()), int(index.max())
        raise ValueError(
            f"{name} must be in [0, {table.num_embeddings}), got {low} to {high}; "
            "check that the tokenizer and the sequence length fit the model"
        ) from None
