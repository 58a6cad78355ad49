"""Transformer, a decoder or encoder: tokens -> Embedding -> Block x L -> Norm -> Head -> loss."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ffn.gpt.build import build_block, build_embedding, build_head
from ffn.gpt.config import TransformerConfig
from ffn.nn.attention import Attention, LayerCache, padding_mask
from ffn.nn.feed_forward import FeedForward
from ffn.nn.head import Head
from ffn.nn.init import init_linear
from ffn.nn.norm import build_norm
from ffn.nn.rotary import rotary_tables


class Transformer(nn.Module):
    """A decoder (causal=True) or an encoder, made of `embedding`, `blocks`, `norm` and `head`.

    `norm` is the identity with norm_position="post"; `head` is None with head="none". Under bfloat16 autocast
    the matmuls run in bfloat16, the norms and the residual stream in float32.

    Args:
        config: the sizes and options; see TransformerConfig.
        device, dtype: of the weights. On "meta" nothing is allocated: call `to_empty(device=...)`, then
            `init_weights()` or `load_state_dict(...)`.

    Raises:
        TypeError: config is not a TransformerConfig.

    >>> config = TransformerConfig(vocab_size=65, dim=64, num_layers=2, num_heads=4)
    >>> Transformer(config)(torch.zeros(1, 7, dtype=torch.int64)).shape
    torch.Size([1, 7, 65])
    """

    origin: dict[str, Any] | None = None  # of a Hugging Face model: its model_type and special tokens
    at_rest: tuple[str, ...] = ()  # submodules that stay in eval mode; see ffn.gpt.freeze

    def __init__(self, config: TransformerConfig, *, device=None, dtype=None):
        super().__init__()
        if not isinstance(config, TransformerConfig):
            got = type(config).__name__
            raise TypeError(
                f"config must be a TransformerConfig, got {got}; from_dict builds one from a dict"
            )
        self.config = config
        meta: dict[str, Any] = {
            "device": "meta",
            "dtype": dtype,
        }  # so that init_weights draws each weight once
        self.embedding = build_embedding(config, **meta)
        self.blocks = nn.ModuleList(build_block(config, i, **meta) for i in range(config.num_layers))
        post = config.norm_position == "post"  # each block ends in a norm
        self.norm = nn.Identity() if post else build_norm(config.norm, config.dim, config.norm_eps, **meta)
        self.head = build_head(config, **meta)
        device = torch.get_default_device() if device is None else torch.device(device)
        if device.type != "meta":
            self.to_empty(device=device)
            self.init_weights()

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draw every weight: embeddings normal with std 0.02, Linears of the blocks by `config.init`.

        Norms become the identity. On the meta device this does nothing. See `ffn.nn.init` for the Linears.
        """
        if self.embedding.weight.is_meta:
            return
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                module.weight.normal_(0.0, 0.02, generator=generator)
            elif isinstance(module, nn.RMSNorm | nn.LayerNorm):
                module.reset_parameters()
        if self.head is not None:
            self.head.reset_parameters(generator)
        for layer, block in enumerate(self.blocks):
            depth: dict[str, Any] = {"num_layers": len(self.blocks), "layer": layer, "generator": generator}
            for module in block.modules():
                if isinstance(module, Attention):
                    for linear in (module.q_proj, module.k_proj, module.v_proj):
                        init_linear(linear, self.config.init, **depth)
                    init_linear(module.o_proj, self.config.init, residual=True, **depth)
                elif isinstance(module, FeedForward):
                    module.reset_parameters(**depth)

    def train(self, mode: bool = True) -> "Transformer":
        """Set training mode, but keep the submodules of `at_rest` in eval mode."""
        super().train(mode)
        for name in self.at_rest:
            self.get_submodule(name).eval()
        return self

    def forward(
        self,
        tokens: Tensor,
        *,
        cache: Sequence[LayerCache] | None = None,
        positions: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_types: Tensor | None = None,
    ) -> Tensor:
        """Return logits (B, T, V) of tokens (B, T), or hidden states with head="none".

        See `hidden` for the arguments.
        """
        hidden = self.hidden(
            tokens, cache=cache, positions=positions, attention_mask=attention_mask, token_types=token_types
        )
        return hidden if self.head is None else self.logits(hidden)

    def hidden(
        self,
        tokens: Tensor,
        *,
        cache: Sequence[LayerCache] | None = None,
        positions: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_types: Tensor | None = None,
    ) -> Tensor:
        """Return the final hidden states (B, T, D), the input of `logits` and `loss`.

        Args:
            tokens: (B, T), int64 or int32.
            cache: one LayerCache per block. The tokens continue the cached ones and are added to them.
            positions: (T) or (B, T). By default a token's position counts the tokens before it that are not
                padding, according to attention_mask, or to pad_token_id of the config.
            attention_mask: (B, S), bool or integers, False or 0 at padding. S counts the cached tokens and
                these.
            token_types: same shape as tokens, with num_token_types in the config; by default all 0.

        Raises:
            ValueError: a shape does not fit, a token is outside the vocabulary, there are more tokens than
                max_seq_len, or token_types are given without a table for them.
            TypeError: attention_mask has a floating dtype.
        """
        c, T = self.config, tokens.shape[-1] if tokens.ndim else 0
        start, mask = self._start(tokens, cache), None
        if attention_mask is not None:
            attention_mask = _real(attention_mask, (tokens.shape[0], start + T))
            mask = padding_mask(attention_mask, T, c.causal)
        if positions is not None:
            _check_positions(positions, tokens)
        elif c.position != "none":
            positions = _positions(tokens, start, attention_mask, c.pad_token_id)
        x = self.embedding(tokens, positions, token_types)
        rotary = None
        if c.position == "rotary" and positions is not None:
            rotary = rotary_tables(positions, c.rotary_channels, c.rotary.theta, c.rotary_scaling)
        for i, block in enumerate(self.blocks):
            own = None if i in c.rotary.skip_layers else rotary
            x = block(x, own, mask, cache[i] if cache else None)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits (..., V) of final hidden states (..., D); ValueError with head="none"."""
        return self._head()(hidden, self._table())

    def loss(
        self,
        tokens: Tensor,
        targets: Tensor,
        *,
        attention_mask: Tensor | None = None,
        token_types: Tensor | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """Return the mean cross entropy, in nats, of targets (B, T) given tokens (B, T): a scalar.

        The logits of a large vocabulary are never stored all at once; see `ffn.nn.loss`.

        Args:
            attention_mask: hides padding from the other tokens; see `hidden`. Its targets still count: set
                them to ignore_index.
            ignore_index: targets with this value do not count.
            label_smoothing: probability mass spread evenly over the vocabulary.
        """
        return self._head().loss(
            self.hidden(tokens, attention_mask=attention_mask, token_types=token_types),
            targets,
            self._table(),
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
        )

    def num_parameters(self) -> int:
        """Return the number of parameters; tied ones count once."""
        return sum(p.numel() for p in self.parameters())

    def _start(self, tokens: Tensor, cache: Sequence[LayerCache] | None) -> int:
        """Return the number of cached tokens; raise ValueError unless the new ones fit behind them."""
        if cache is not None and len(cache) != len(self.blocks):
            raise ValueError(
                f"cache must hold one LayerCache per block, {len(self.blocks)}; got {len(cache)}"
            )
        start, limit = cache[0].length if cache else 0, self.config.max_seq_len
        if tokens.ndim != 2 or start + tokens.shape[1] > limit:
            held = f" after {start} cached tokens" if start else ""
            raise ValueError(
                f"tokens must be (B, T) with T at most max_seq_len={limit}, got {tuple(tokens.shape)}{held}"
            )
        return start

    def _head(self) -> Head:
        if self.head is None:
            raise ValueError("head must be 'logits' or 'mlm' for logits and loss, got 'none'")
        return self.head

    def _table(self) -> Tensor | None:
        return self.embedding.weight if self.config.tie_embeddings else None


def _check_positions(positions: Tensor, tokens: Tensor) -> None:
    shapes = {1: (tokens.shape[1:],), 2: (tokens.shape, (1, tokens.shape[1]))}
    if positions.shape not in shapes.get(
        positions.ndim, ()
    ):  # the other rank would add a guard in torch.export
        like, got = tuple(tokens.shape), tuple(positions.shape)
        raise ValueError(f"positions must be (T) or (B, T) for tokens {like}, got {got}")


def _positions(tokens: Tensor, start: int, real: Tensor | None, pad_token_id: int | None) -> Tensor:
    """Return each token's position behind `start` cached ones: (T), or (B, T) with padding."""
    if pad_token_id is not None:
        found = tokens != pad_token_id
        return torch.where(found, found.cumsum(-1) - 1, -1)
    if real is None:
        return torch.arange(start, start + tokens.shape[1], device=tokens.device)
    return (real.cumsum(-1) - 1).clamp_(min=0)[:, start:]


def _real(attention_mask: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return the mask as bool; raise unless its shape and dtype fit."""
    if attention_mask.shape != shape:
        got = tuple(attention_mask.shape)
        raise ValueError(f"attention_mask must be (B, S) = {shape} with the cached tokens, got {got}")
    if attention_mask.is_floating_point():
        raise TypeError(f"attention_mask must be bool or integers, 0 at padding, got {attention_mask.dtype}")
    return attention_mask.bool()
