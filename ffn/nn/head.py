"""The head: hidden states become scores for every entry of the vocabulary, or a loss without storing them."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ffn.nn.loss import linear_cross_entropy


class Head(nn.Module):
    """The output matrix (V, D), without a bias.

    A tied head owns nothing: the token table is handed to each call. The table thus exists once, in the state
    dict and in memory, and no way of moving or loading a model can part the two.

    Args:
        dim: D. vocab_size: V.
        tied: whether calls bring the matrix.

    Source: Press, Wolf 2017 for tying.
    """

    weight: nn.Parameter | None

    def __init__(self, dim: int, vocab_size: int, *, tied: bool = False, device=None, dtype=None):
        super().__init__()
        self.dim, self.vocab_size = dim, vocab_size
        own = None if tied else nn.Parameter(torch.empty(vocab_size, dim, device=device, dtype=dtype))
        self.register_parameter("weight", own)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Normal, 0.02."""
        if self.weight is not None and not self.weight.is_meta:
            self.weight.normal_(0.0, 0.02, generator=generator)

    def forward(self, hidden: Tensor, table: Tensor | None = None) -> Tensor:
        """Logits (..., V) of hidden (..., D); `table` (V, D) is the token table of a tied head."""
        return F.linear(hidden, self._matrix(table))

    def loss(
        self,
        hidden: Tensor,
        targets: Tensor,
        table: Tensor | None = None,
        *,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """The mean cross entropy of hidden (..., D) and targets (...); see `ffn.nn.loss`."""
        return linear_cross_entropy(
            hidden,
            self._matrix(table),
            targets,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
        )

    def _matrix(self, table: Tensor | None) -> Tensor:
        weight = self.weight if table is None else table
        if weight is None or (table is not None and self.weight is not None):
            raise ValueError("a tied head wants the token table with each call, an untied one wants none")
        return weight

    def extra_repr(self) -> str:
        return f"dim={self.dim}, vocab_size={self.vocab_size}, tied={self.weight is None}"
