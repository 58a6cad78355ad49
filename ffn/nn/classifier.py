"""A Transformer that sorts texts: its hidden states pooled into one vector a text, and scores from that."""

from collections.abc import Iterator
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor, nn

from ffn import activations, ops
from ffn.ops.arguments import check_size
from ffn.ops.dropout import check_probability

Pooling = Literal["first", "mean", "last"]
Transform = Literal["tanh", "relu"]


class Backbone(Protocol):
    """What a `Transformer` offers here."""

    config: Any

    def parameters(self) -> Iterator[nn.Parameter]:
        """Every weight."""
        ...

    def hidden(
        self, tokens: Tensor, *, attention_mask: Tensor | None = None, token_types: Tensor | None = None
    ) -> Tensor:
        """The final hidden states (B, T, D)."""
        ...


class ClassifierHead(nn.Module):
    """out_proj(dropout(act(dense(pooled)))); without a transform dense and act are left out.

    Args:
        dim: D. num_classes: how many scores.
        transform: "tanh" (BERT's pooler, RoBERTa's head), "relu" (DistilBERT's) or None.
        dropout: probability to drop a value before out_proj while training.
        bias: of out_proj.

    Shape:
        (..., D) -> (..., num_classes).

    Raises:
        ValueError: no positive number of classes, no such transform, or a dropout that is no probability.
    """

    def __init__(
        self,
        dim: int,
        num_classes: int,
        transform: Transform | None = None,
        dropout: float = 0.0,
        *,
        bias: bool = True,
        device=None,
        dtype=None,
    ):
        super().__init__()
        check_size("num_classes", num_classes)
        if transform not in (None, *get_args(Transform)):
            raise ValueError(f"transform={transform!r}: want {' or '.join(get_args(Transform))}, or None")
        check_probability("dropout", dropout)
        self.transform, self.dropout = transform, dropout
        self.dense = nn.Linear(dim, dim, device=device, dtype=dtype) if transform is not None else None
        self.out_proj = nn.Linear(dim, num_classes, bias=bias, device=device, dtype=dtype)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Matrices normal 0.02, biases 0; nothing on the meta device."""
        for linear in (self.dense, self.out_proj):
            if linear is not None and not linear.weight.is_meta:
                linear.weight.normal_(0.0, 0.02, generator=generator)
                if linear.bias is not None:
                    linear.bias.zero_()

    def forward(self, pooled: Tensor) -> Tensor:
        x = pooled
        if self.dense is not None and self.transform is not None:
            x = activations.TABLE[self.transform](self.dense(x))
        return self.out_proj(ops.dropout(x, self.dropout, self.training))

    def extra_repr(self) -> str:
        return f"transform={self.transform}, dropout={self.dropout}"


class Classifier(nn.Module):
    """Scores of a text for each class: head(pool(backbone.hidden(tokens))). Regression is num_classes=1.

    With transform="tanh" over the first token this is BERT's and RoBERTa's classifier, with "relu" that of
    DistilBERT, over the last token without a transform and without a bias that of the decoders.

    Args:
        backbone: a Transformer; its own head is not used.
        num_classes: how many scores.
        pooling: the vector of a text: of its "first" token, of its "last", or the "mean" of all. Padding
            counts for none of them, on whichever side it stands.
        transform, dropout, bias: see ClassifierHead. bias left out: there is one unless pooling="last".

    Shape:
        tokens (B, T) -> (B, num_classes).

    Raises:
        ValueError: no such pooling or transform; a first token of a decoder, which has seen no other.

    Sources: Devlin et al. 2019; Liu et al. 2019; Radford et al. 2018 (the last token).
    """

    backbone: Backbone
    pooling: Pooling

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        pooling: Pooling = "first",
        transform: Transform | None = None,
        dropout: float = 0.0,
        *,
        bias: bool | None = None,
    ):
        super().__init__()
        config = backbone.config
        if pooling not in get_args(Pooling):
            raise ValueError(f"pooling={pooling!r}: want one of {', '.join(get_args(Pooling))}")
        if pooling == "first" and config.causal:
            raise ValueError("pooling='first': a decoder's first token has seen no other; want last or mean")
        self.backbone, self.pooling = backbone, pooling
        bias = pooling != "last" if bias is None else bias
        weight = backbone.embedding.weight  # pyright: ignore[reportAttributeAccessIssue]
        self.head = ClassifierHead(
            config.dim, num_classes, transform, dropout, bias=bias, device=weight.device, dtype=weight.dtype
        )

    @property
    def num_classes(self) -> int:
        """How many scores there are."""
        return self.head.out_proj.out_features

    def forward(
        self, tokens: Tensor, *, attention_mask: Tensor | None = None, token_types: Tensor | None = None
    ) -> Tensor:
        """Scores (B, num_classes); the arguments as `Transformer.hidden` takes them."""
        return self.head(self.pooled(tokens, attention_mask=attention_mask, token_types=token_types))

    def pooled(
        self, tokens: Tensor, *, attention_mask: Tensor | None = None, token_types: Tensor | None = None
    ) -> Tensor:
        """One vector (B, D) a text, which `head` reads; without a graph where the backbone is frozen."""
        trains = any(p.requires_grad for p in self.backbone.parameters())
        with torch.set_grad_enabled(trains and torch.is_grad_enabled()):
            hidden = self.backbone.hidden(tokens, attention_mask=attention_mask, token_types=token_types)
            return pool(hidden, attention_mask, self.pooling)

    def extra_repr(self) -> str:
        return f"pooling={self.pooling!r}"


def pool(hidden: Tensor, attention_mask: Tensor | None, pooling: Pooling) -> Tensor:
    """(B, T, D) -> (B, D). attention_mask (B, T), False or 0 at padding; every text has a real token."""
    if attention_mask is None:
        match pooling:
            case "first":
                return hidden[:, 0]
            case "last":
                return hidden[:, -1]
        return hidden.mean(1)
    real = attention_mask.bool()
    if pooling == "mean":
        kept = torch.where(real[..., None], hidden, 0.0)
        return kept.sum(1) / real.sum(1, keepdim=True).to(hidden.dtype)
    places = torch.arange(real.shape[1], device=real.device)
    at = real.int().argmax(1) if pooling == "first" else (real * places).argmax(1)
    return hidden[torch.arange(len(hidden), device=hidden.device), at]
