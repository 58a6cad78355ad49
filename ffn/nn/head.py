"""The head: hidden states become scores for every entry of the vocabulary, or a loss without storing them."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ffn import activations
from ffn.nn.init import init_linear
from ffn.nn.loss import cap, linear_cross_entropy


class HeadTransform(nn.Module):
    """norm(act(dense(hidden))), what BERT does before the product with the vocabulary.

    Args:
        dim: D. activation: a plain one of the table. norm: over D.

    Shape:
        (..., D) -> (..., D).

    Raises:
        ValueError: no such activation, or a gated one.

    Source: Devlin et al. 2019.
    """

    def __init__(self, dim: int, activation: str, norm: nn.Module, *, device=None, dtype=None):
        super().__init__()
        check_head_activation(activation)
        self.activation = activations.resolve(activation).name
        self.dense = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.norm = norm

    def forward(self, hidden: Tensor) -> Tensor:
        return self.norm(activations.TABLE[self.activation](self.dense(hidden)))

    def extra_repr(self) -> str:
        return f"activation={self.activation}"


def check_head_activation(activation: str) -> None:
    """Raise ValueError unless it is a plain one of the table."""
    if activations.resolve(activation).gated:
        raise ValueError(f"head_activation={activation!r}: want a plain one, such as gelu")


class Head(nn.Module):
    """The output matrix (V, D), with what may stand before and behind its product.

        logits = cap(transform(hidden) weight^T + bias)        cap(z) = softcap tanh(z / softcap)

    A tied head owns no matrix: the token table is handed to each call. The table thus exists once, in the
    state dict and in memory, and no way of moving or loading a model can part the two.

    Args:
        dim: D. vocab_size: V.
        tied: whether calls bring the matrix.
        bias: whether there is one.
        softcap: bounds the logits; None leaves them.
        transform: a module (..., D) -> (..., D) before the product; None for none.

    Shape:
        hidden (..., D) -> (..., V); a tied head's calls bring the table (V, D).

    Raises:
        ValueError: a tied head without the table, or an untied one with it.

    Sources: Press, Wolf 2017 for tying; Gemma Team 2024 for the softcap.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        dim: int,
        vocab_size: int,
        *,
        tied: bool = False,
        bias: bool = False,
        softcap: float | None = None,
        transform: nn.Module | None = None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.dim, self.vocab_size, self.softcap = dim, vocab_size, softcap
        self.transform = transform
        own = None if tied else nn.Parameter(torch.empty(vocab_size, dim, device=device, dtype=dtype))
        self.register_parameter("weight", own)
        added = nn.Parameter(torch.empty(vocab_size, device=device, dtype=dtype)) if bias else None
        self.register_parameter("bias", added)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Normal, 0.02; biases 0."""
        if isinstance(self.transform, HeadTransform):
            init_linear(self.transform.dense, "gpt2", generator=generator)
        if self.weight is not None and not self.weight.is_meta:
            self.weight.normal_(0.0, 0.02, generator=generator)
        if self.bias is not None:
            self.bias.zero_()

    def forward(self, hidden: Tensor, table: Tensor | None = None) -> Tensor:
        """Logits (..., V) of hidden (..., D); `table` (V, D) is the token table of a tied head."""
        return cap(F.linear(self.transformed(hidden), self._matrix(table), self.bias), self.softcap)

    def transformed(self, hidden: Tensor) -> Tensor:
        """What the product reads."""
        return hidden if self.transform is None else self.transform(hidden)

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
            self.transformed(hidden),
            self._matrix(table),
            targets,
            bias=self.bias,
            softcap=self.softcap,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
        )

    def _matrix(self, table: Tensor | None) -> Tensor:
        weight = self.weight if table is None else table
        if weight is None or (table is not None and self.weight is not None):
            raise ValueError("a tied head wants the token table with each call, an untied one wants none")
        return weight

    def extra_repr(self) -> str:
        text = f"dim={self.dim}, vocab_size={self.vocab_size}, tied={self.weight is None}"
        return text if self.softcap is None else f"{text}, softcap={self.softcap}"
