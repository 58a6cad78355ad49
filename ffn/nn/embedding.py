"""Tokens become vectors here."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ffn import ops


class Embedding(nn.Module):
    """One row of a table a token, plus one of a second table a position where positions are learned.

        dropout(norm(scale * token[t] + token_type[k] + position[offset + p]))      what is absent is left out

    Args:
        vocab_size: V, rows of `token`.
        dim: D.
        max_seq_len: positions in `position`; None for no learned positions.
        dropout: probability to drop a value while training.
        position_offset: rows of `position` before that of position 0.
        num_token_types: rows of `token_type`; 0 for none.
        scale: of the token's row.
        norm: builds a norm over D; None for none.

    Shape:
        tokens (B, T) int64 or int32, positions (T) or (B, T) int64 -> (B, T, D).
        token_types: as tokens; 0 everywhere if left out.

    Raises:
        ValueError: an index outside its table (on the CPU; a GPU asserts by itself), or token types that
            there is no table for.
        TypeError: tokens that are not integers.
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
        """The token table (V, D), which a tied head reads too."""
        return self.token.weight

    def forward(
        self, tokens: Tensor, positions: Tensor | None = None, token_types: Tensor | None = None
    ) -> Tensor:
        if tokens.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"tokens want int64 or int32; got {str(tokens.dtype)[6:]}; cast with .long()")
        x = _look_up(self.token, tokens, "tokens")
        if self.scale != 1.0:
            x = x * torch.full((), self.scale, dtype=x.dtype, device=x.device)  # rounded as the weights are
        if self.token_type is not None:
            types = torch.zeros_like(tokens) if token_types is None else token_types
            x = x + _look_up(self.token_type, types, "token_types")
        elif token_types is not None:
            raise ValueError("token_types: this embedding has no table for them; leave them out")
        if self.position is not None:
            if positions is None:
                positions = torch.arange(tokens.shape[-1], device=tokens.device)
            if self.position_offset:
                positions = positions + self.position_offset
            x = x + _look_up(self.position, positions, "positions")
        if self.norm is not None:
            x = self.norm(x)
        return ops.dropout(x, self.dropout, self.training)

    def extra_repr(self) -> str:
        return f"dropout={self.dropout}" if self.dropout else ""


def _look_up(table: nn.Embedding, index: Tensor, name: str) -> Tensor:
    try:
        return table(index)
    except IndexError:
        low, high = int(index.min()), int(index.max())
        raise ValueError(
            f"{name} want 0 <= index < {table.num_embeddings}; got {low} to {high}; "
            "check that the vocabulary and the window are the model's"
        ) from None
