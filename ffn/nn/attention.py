"""Attention, its key/value cache and its masks; multi-head or grouped-query, causal or not."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional as F

from ffn.ops.arguments import check_size
from ffn.ops.attention import attend
from ffn.ops.dropout import dropout
from ffn.ops.torch_modes import autocasts

QK_NORM_SCOPES = ("head", "all")


class Attention(nn.Module):
    """Scaled dot-product attention of Q query heads over G key/value heads of C channels.

        y = o_proj(softmax(scale q k^T) v)        q, k, v = q_proj(x), k_proj(x), v_proj(x)

    Args:
        dim: D.
        num_heads: Q.
        num_kv_heads: G, a divisor of Q; Q by default.
        head_dim: C; D / Q by default.
        causal: True if a token attends only to itself and earlier tokens.
        dropout: probability of dropping an attention weight in training.
        out_dropout: probability of dropping an output value in training.
        qkv_bias, out_bias: True to add biases to q, k and v, and to the output.
        qk_norm: builds a norm over the C channels of each query and key head, e.g. torch.nn.RMSNorm.
        qk_norm_scope: "all" to norm the channels of all heads together, "head" for each head alone.
        window: number of positions that a token attends to, its own included; None for all.
        scale: factor on the scores; 1/sqrt(C) by default.
        softcap: if set, scores s become softcap tanh(s / softcap).

    Shape:
        x (B, T, D) -> (B, T, D). rotary: the tables of `ffn.nn.rotary.rotary_tables`.
        mask: bool, broadcast to (B, 1, T, S) for S keys, True where a token may attend; it replaces the
            causal mask.
        cache: the keys and values of earlier positions; x continues them, and S = cache.length + T.

    On the CPU the scores are always computed in float32: its kernels are several times faster there than
    bfloat16's, above all in backward and for one query.

    Raises:
        ValueError: if a size is not positive or does not divide, the scope is unknown, or window is set
            without causal.

    Sources: Vaswani et al. 2017; Ainslie et al. 2023 (grouped queries); Henry et al. 2020 (q/k norm);
    Beltagy et al. 2020 (windows); Gemma Team 2024 (softcap).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        causal: bool = True,
        dropout: float = 0.0,
        out_dropout: float = 0.0,
        qkv_bias: bool = False,
        out_bias: bool = False,
        qk_norm: Callable[[int], nn.Module] | None = None,
        qk_norm_scope: str = "head",
        window: int | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        check_heads(dim, num_heads, num_kv_heads, head_dim)
        if window is not None and not (causal and window > 0):
            raise ValueError(
                f"window must be positive and needs causal=True, got window={window}, causal={causal}"
            )
        if qk_norm_scope not in QK_NORM_SCOPES:
            raise ValueError(
                f"qk_norm_scope must be one of {', '.join(QK_NORM_SCOPES)}, got {qk_norm_scope!r}"
            )
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads or num_heads
        self.head_dim = head_dim or dim // num_heads
        self.causal, self.dropout, self.out_dropout = causal, dropout, out_dropout
        self.window, self.scale, self.softcap = window, scale, softcap
        wide, narrow = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(dim, wide, bias=qkv_bias, device=device, dtype=dtype)
        self.k_proj = nn.Linear(dim, narrow, bias=qkv_bias, device=device, dtype=dtype)
        self.v_proj = nn.Linear(dim, narrow, bias=qkv_bias, device=device, dtype=dtype)
        self.o_proj = nn.Linear(wide, dim, bias=out_bias, device=device, dtype=dtype)
        self.qk_norm_scope = qk_norm_scope
        over = (wide, narrow) if qk_norm_scope == "all" else (self.head_dim, self.head_dim)
        self.q_norm = qk_norm(over[0]) if qk_norm is not None else None
        self.k_norm = qk_norm(over[1]) if qk_norm is not None else None

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
        cache: "LayerCache | None" = None,
    ) -> Tensor:
        if autocasts(x):
            x = x.to(torch.get_autocast_dtype(x.device.type))  # once, instead of once in each matmul
        return self.mix((self.q_proj(x), self.k_proj(x), self.v_proj(x)), rotary, mask, cache)

    def mix(
        self,
        projected: Sequence[Tensor],
        rotary: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
        cache: "LayerCache | None" = None,
    ) -> Tensor:
        """Compute the output from q_proj(x), k_proj(x) and v_proj(x), each (B, T, heads C)."""
        dtype, device, autocast = projected[0].dtype, projected[0].device.type, autocasts(projected[0])
        q, k, v = map(self._heads, projected)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self._norm(self.q_norm, q), self._norm(self.k_norm, k)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if cache is not None:
            k, v = cache.append(k, v)
        with torch.autocast(device, enabled=False) if autocast else nullcontext():
            y_BQTC = self._attend(q, k, v, mask)
        y = self.o_proj(y_BQTC.transpose(1, 2).flatten(2).to(dtype))
        return dropout(y, self.out_dropout, self.training)

    def _heads(self, x: Tensor) -> Tensor:
        half = x.dtype in (torch.bfloat16, torch.float16)
        x = x.float() if half and x.device.type == "cpu" else x
        return x.reshape(
            *x.shape[:-1], x.shape[-1] // self.head_dim, self.head_dim
        )  # works without tokens too

    def _norm(self, norm: nn.Module, x_BTQC: Tensor) -> Tensor:
        x = x_BTQC.flatten(2) if self.qk_norm_scope == "all" else x_BTQC
        return norm(x).to(x.dtype).view(x_BTQC.shape)  # autocast norms in float32

    def _attend(self, q_BQTC: Tensor, k_BGSC: Tensor, v_BGSC: Tensor, mask: Tensor | None) -> Tensor:
        T, S = q_BQTC.shape[2], k_BGSC.shape[2]
        causal = self.causal and mask is None
        p = self.dropout if self.training else 0.0
        if self.window is not None and self.window < S:
            seen = causal_mask(T, S, q_BQTC.device).triu(S - T - self.window + 1)
            causal, mask = False, seen if mask is None else mask & seen
        if causal and S > T:  # torch's flag would align the first query with the first key
            causal, mask = False, causal_mask(T, S, q_BQTC.device) if T > 1 else None
        if self.softcap is not None or (p > 0.0 and q_BQTC.device.type == "cpu"):
            mask = causal_mask(T, S, q_BQTC.device) if causal else mask
            return attend_in_full(q_BQTC, k_BGSC, v_BGSC, mask, p, self.scale, self.softcap)
        if mask is None and p == 0.0 and S == T and self.scale is None:
            return attend(q_BQTC, k_BGSC, v_BGSC, causal=causal)
        gqa = self.num_kv_heads != self.num_heads
        return F.scaled_dot_product_attention(
            q_BQTC, k_BGSC, v_BGSC, mask, p, causal, scale=self.scale, enable_gqa=gqa
        )

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}, "
            f"causal={self.causal}, dropout={self.dropout}, out_dropout={self.out_dropout}"
            + "".join(
                f", {name}={value}"
                for name in ("window", "scale", "softcap")
                if (value := getattr(self, name)) is not None
            )
        )


class LayerCache:
    """The keys and values (B, G, S, C) of one layer for the S positions so far, at most `capacity`.

    The first `append` allocates the memory, with the shape, dtype and device of its tensors. The cache is
    written in place, so gradients cannot flow through it.
    """

    def __init__(self, capacity: int):
        self.capacity, self.length = capacity, 0
        self.memory: tuple[Tensor, Tensor] | None = None  # both (B, G, capacity, C)

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k and v (B, G, T, C); return all keys and values so far, (B, G, S, C), as views.

        Raises:
            ValueError: if there are more positions than the capacity.
        """
        start, end = self.length, self.length + k.shape[2]
        if end > self.capacity:
            raise ValueError(f"capacity must be at least {end} for this sequence, got {self.capacity}")
        if self.memory is None:
            shape = *k.shape[:2], self.capacity, k.shape[3]
            self.memory = k.new_empty(shape), v.new_empty(shape)
        keys, values = self.memory
        keys.narrow(2, start, end - start).copy_(k)
        values.narrow(2, start, end - start).copy_(v)
        self.length = end
        return keys.narrow(2, 0, end), values.narrow(2, 0, end)


def rotate(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """Rotate each pair of channels (i, i + R/2) of x (B, T, Q, C) by its angle; see `rotary_tables`.

    If the tables have R < C channels, only the first R rotate.
    """
    R = cos.shape[-1]
    turning, staying = (x, None) if x.shape[-1] == R else (x[..., :R], x[..., R:])
    swapped = turning.roll(R // 2, -1)
    turned = torch.addcmul(turning * cos, swapped, signed_sin).to(x.dtype)
    return turned if staying is None else torch.cat((turned, staying), -1)


def causal_mask(T: int, S: int, device) -> Tensor:
    """Return bool (T, S): True unless the key is after the query, one of the last T of S positions."""
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)


def padding_mask(real: Tensor, T: int, causal: bool) -> Tensor:
    """Return the mask (B, 1, T, S) for the last T of S positions when some keys are padding.

    A position may always attend to itself, so that the values at padding stay finite.

    Args:
        real: bool (B, S), True at tokens, False at padding.
    """
    S = real.shape[1]
    allowed = real[:, None, None, :].expand(-1, 1, T, S)
    if T == 1:
        return allowed
    seen = causal_mask(T, S, real.device)
    itself = seen.triu(S - T)
    return (allowed & seen if causal else allowed) | itself


def attend_in_full(
    q_BQTC: Tensor,
    k_BGSC: Tensor,
    v_BGSC: Tensor,
    mask: Tensor | None,
    p: float,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Return softmax(scale q k^T) v from the full score matrix, with dropout on the weights and a soft cap.

    Used for dropout on the CPU, where torch's scaled_dot_product_attention has no fused kernel, is slower and
    saves the dropout mask; and for soft caps, which torch does not have.
    """
    B, Q, T, C = q_BQTC.shape
    group = Q // k_BGSC.shape[1]
    q = rearrange(q_BQTC, "b q t c -> (b q) t c")
    k, v = (repeat(t, "b g s c -> (b g group) s c", group=group) for t in (k_BGSC, v_BGSC))
    shift = q.new_zeros(())
    if mask is not None:
        shift = q.new_zeros(mask.shape).masked_fill_(~mask, -torch.inf)
        shift = shift.expand(B, Q, T, -1).flatten(0, 1) if shift.ndim == 4 else shift
    factor = C**-0.5 if scale is None else scale
    if softcap is None:
        scores = torch.baddbmm(shift, q, k.mT, alpha=factor)
    else:
        scores = torch.bmm(q, k.mT).mul(factor / softcap).tanh().mul(softcap) + shift
    weights = scores.softmax(-1)
    return rearrange(torch.bmm(dropout(weights, p), v), "(b q) t c -> b q t c", q=Q)


def check_heads(dim: int, num_heads: int, num_kv_heads: int | None, head_dim: int | None) -> None:
    """Raise ValueError unless num_heads divides dim, num_kv_heads divides num_heads, and all are positive."""
    check_size("dim", dim)
    check_size("num_heads", num_heads)
    for name, size in (("num_kv_heads", num_kv_heads), ("head_dim", head_dim)):
        if size is not None:
            check_size(name, size)
    if head_dim is None and dim % num_heads:
        raise ValueError(
            f"dim must be a multiple of num_heads={num_heads} unless head_dim is given, got {dim}"
        )
    if num_kv_heads is not None and num_heads % num_kv_heads:
        raise ValueError(f"num_heads must be a multiple of num_kv_heads={num_kv_heads}, got {num_heads}")
