"""`Classifier`: a Transformer with pooling and a head that gives the logits of a text."""

from collections.abc import Iterator
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor, nn

from ffn import activations
from ffn.ops.arguments import check_size
from ffn.ops.dropout import check_probability, dropout

Pooling = Literal["first", "mean", "last"]
Transform = Literal["tanh", "relu"]


class Backbone(Protocol):
    """The part of a `Transformer` that `Classifier` uses."""

    config: Any

    def parameters(self) -> Iterator[nn.Parameter]:
        """Iterate over all weights."""
        ...

    def hidden(
        self, tokens: Tensor, *, attention_mask: Tensor | None = None, token_types: Tensor | None = None
    ) -> Tensor:
        """Return the final hidden states (B, T, D)."""
        ...


class ClassifierHead(nn.Module):
    """Compute out_proj(dropout(act(dense(pooled)))); transform=None omits dense and act.

    Args:
        dim: width D of the input.
        num_classes: number of logits.
        transform: act is "tanh" (BERT's pooler, RoBERTa's head) or "relu" (DistilBERT); None omits it.
        dropout: dropout probability before out_proj.
        bias: give out_proj a bias.

    Shape:
        (..., D) -> (..., num_classes).

    Raises:
        ValueError: num_classes below 1, an unknown transform, or a dropout outside [0, 1).
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
            raise ValueError(f"transform must be {', '.join(get_args(Transform))} or None, got {transform!r}")
        check_probability("dropout", dropout)
        self.transform, self.dropout = transform, dropout
        self.dense = nn.Linear(dim, dim, device=device, dtype=dtype) if transform is not None else None
        self.out_proj = nn.Linear(dim, num_classes, bias=bias, device=device, dtype=dtype)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw matrices from a normal distribution of std 0.02; set biases to 0. Skips the meta device."""
        for linear in (self.dense, self.out_proj):
            if linear is not None and not linear.weight.is_meta:
                linear.weight.normal_(0.0, 0.02, generator=generator)
                if linear.bias is not None:
                    linear.bias.zero_()

    def forward(self, pooled: Tensor) -> Tensor:
        x = pooled
        if self.dense is not None and self.transform is not None:
            x = activations.TABLE[self.transform](self.dense(x))
        return self.out_proj(dropout(x, self.dropout, self.training))

    def extra_repr(self) -> str:
        return f"transform={self.transform}, dropout={self.dropout}"


class Classifier(nn.Module):
    """Compute the logits of texts: head(pool(backbone.hidden(tokens))). Regression is num_classes=1.

    BERT and RoBERTa pool the first token with transform="tanh", DistilBERT the first with "relu"; decoders
    pool the last token without transform and bias.

    Args:
        backbone: a Transformer; its own head is not used.
        num_classes: number of logits.
        pooling: the hidden state of the "first" or "last" token, or the "mean" over tokens. Padding on
            either side is ignored.
        transform, dropout: see ClassifierHead.
        bias: give out_proj a bias; by default True unless pooling="last".

    Shape:
        tokens (B, T) -> (B, num_classes).

    Raises:
        ValueError: an unknown pooling or transform, or pooling="first" on a decoder.

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
            raise ValueError(f"pooling must be one of {', '.join(get_args(Pooling))}, got {pooling!r}")
        if pooling == "first" and config.causal:
            raise ValueError(
                "pooling must be last or mean for a decoder (its first token sees no other), got 'first'"
            )
        self.backbone, self.pooling = backbone, pooling
        bias = pooling != "last" if bias is None else bias
        weight = backbone.embedding.weight  # pyright: ignore[reportAttributeAccessIssue]
        self.head = ClassifierHead(
            config.dim, num_classes, transform, dropout, bias=bias, device=weight.device, dtype=weight.dtype
        )

    @property
    def num_classes(self) -> int:
        """Number of logits."""
        return self.head.out_proj.out_features

    def forward(
        self, tokens: Tensor, *, attention_mask: Tensor | None = None, token_types: Tensor | None = None
    ) -> Tensor:
        """Return logits (B, num_classes); the arguments are those of `Transformer.hidden`."""
        return self.head(self.pooled(tokens, attention_mask=attention_mask, token_types=token_types))

    def pooled(
        self, tokens: Tensor, *, attention_mask: Tensor | None = None, token_types: Tensor | None = None
    ) -> Tensor:
        """Return the input of `head`, (B, D); a frozen backbone runs without gradients."""
        trains = any(p.requires_grad for p in self.backbone.parameters())
        with torch.set_grad_enabled(trains and torch.is_grad_enabled()):
            hidden = self.backbone.hidden(tokens, attention_mask=attention_mask, token_types=token_types)
            return pool(hidden, attention_mask, self.pooling)

    def extra_repr(self) -> str:
        return f"pooling={self.pooling!r}"


def pool(hidden: Tensor, attention_mask: Tensor | None, pooling: Pooling) -> Tensor:
    """Pool (B, T, D) -> (B, D). attention_mask (B, T) is 0 at padding; each text needs one real token."""
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
