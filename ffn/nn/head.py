"""The head: hidden states to logits over the vocabulary, or to a loss without storing the logits."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ffn import activations
from ffn.nn.init import init_linear
from ffn.nn.loss import cap, linear_cross_entropy


class HeadTransform(nn.Module):
    """norm(act(dense(hidden))), as in BERT before the matmul with the vocabulary.

    Args:
        dim: D.
        activation: the name of a plain activation of the table.
        norm: a norm over D.

    Shape:
        (..., D) -> (..., D).

    Raises:
        ValueError: if the activation is unknown or gated.

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
    """Raise ValueError unless this is the name of a plain activation of the table."""
    if activations.resolve(activation).gated:
        raise ValueError(f"head_activation must be a plain activation such as gelu, got {activation!r}")


class Head(nn.Module):
    """The output matrix (V, D), with an optional transform, bias and soft cap.

        logits = cap(transform(hidden) weight^T + bias)        cap(z) = softcap tanh(z / softcap)

    A tied head owns no matrix: each call passes the token table. The table exists once, in the state dict and
    in memory, so moving or loading a model cannot separate the two.

    Args:
        dim: D.
        vocab_size: V.
        tied: True if each call passes the matrix.
        bias: True to add a bias (V).
        softcap: bound on the logits; None for no bound.
        transform: a module (..., D) -> (..., D) before the matmul; None for no transform.

    Shape:
        hidden (..., D) -> (..., V); a tied head also takes the table (V, D).

    Raises:
        ValueError: if a tied head is called without the table, or an untied head with it.

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
        """Draw weights from a normal distribution of standard deviation 0.02; set biases to 0."""
        if isinstance(self.transform, HeadTransform):
            init_linear(self.transform.dense, "gpt2", generator=generator)
        if self.weight is not None and not self.weight.is_meta:
            self.weight.normal_(0.0, 0.02, generator=generator)
        if self.bias is not None:
            self.bias.zero_()

    def forward(self, hidden: Tensor, table: Tensor | None = None) -> Tensor:
        """Return the logits (..., V) of hidden (..., D); `table` (V, D) is the token table of a tied head."""
        return cap(F.linear(self.transformed(hidden), self._matrix(table), self.bias), self.softcap)

    def transformed(self, hidden: Tensor) -> Tensor:
        """Return the input of the matmul."""
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
        """Return the mean cross entropy of hidden (..., D) and targets (...); see `ffn.nn.loss`."""
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
            raise ValueError("table must be given to a tied head and left out for an untied one")
        return weight

    def extra_repr(self) -> str:
        text = f"dim={self.dim}, vocab_size={self.vocab_size}, tied={self.weight is None}"
        return text if self.softcap is None else f"{text}, softcap={self.softcap}"
