"""Tokens become vectors here, and positions become the angles that attention turns queries and keys by."""

import torch
from torch import Tensor, nn

from ffn import ops


class Embedding(nn.Module):
    """One row of a table a token, plus one of a second table a position where positions are learned.

    Args:
        vocab_size: V, rows of `token`.
        dim: D.
        max_seq_len: rows of `position`; None for no learned positions.
        dropout: probability to drop a value while training.

    Shape:
        tokens (B, T) int64 or int32, positions (T) or (B, T) int64 -> (B, T, D).

    Raises:
        ValueError: a token or position outside its table (on the CPU; a GPU asserts by itself).
        TypeError: tokens that are not integers.
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        max_seq_len: int | None = None,
        *,
        dropout: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.dropout = dropout
        self.token = nn.Embedding(vocab_size, dim, device=device, dtype=dtype)
        self.position = None
        if max_seq_len is not None:
            self.position = nn.Embedding(max_seq_len, dim, device=device, dtype=dtype)

    @property
    def weight(self) -> Tensor:
        """The token table (V, D), which a tied head reads too."""
        return self.token.weight

    def forward(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        if tokens.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"tokens want int64 or int32; got {str(tokens.dtype)[6:]}; cast with .long()")
        x = _look_up(self.token, tokens, "tokens")
        if self.position is not None:
            if positions is None:
                positions = torch.arange(tokens.shape[-1], device=tokens.device)
            x = x + _look_up(self.position, positions, "positions")
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


def rotary_tables(
    positions: Tensor, head_dim: int, base: float = 10_000.0, scaling: float = 1.0
) -> tuple[Tensor, Tensor]:
    """cos and signed sin of position / scaling * base^(-2i/C), as `ffn.nn.attention.rotate` wants them.

    They are recomputed in each forward, for all layers at once, and never stored: a buffer would be rounded
    by `.to(dtype)` and left empty by `to_empty`.

    Args:
        positions: (T) or (B, T), integers.
        head_dim: C, even. Channel i is paired with channel i + C/2, as Llama's weights are (the paper pairs
            neighbours).
        base: of the geometric row of frequencies; larger turns slower.
        scaling: positions are divided by it, which fits a model into a window that many times longer.

    Returns:
        two of (..., T, 1, C), float32 in any model: [cos, cos] and [-sin, sin].

    Raises:
        ValueError: an odd head_dim.

    Sources: Su et al. 2021; Chen et al. 2023 for the scaling.
    """
    if head_dim % 2:
        raise ValueError(
            f"rotary positions turn pairs of channels; head_dim={head_dim} is odd; choose an even one"
        )
    half, device = head_dim // 2, positions.device
    frequencies = torch.pow(base, -torch.arange(half, dtype=torch.float32, device=device) / half)
    signed = torch.cat((-frequencies, frequencies)) / scaling  # cos is even and sin odd: this signs only sin
    angles = positions.to(torch.float32)[..., None, None] * signed
    return angles.cos(), angles.sin()
