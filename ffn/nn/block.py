"""The block: attention and the feed-forward, each behind its norm, written into the residual stream."""

from collections.abc import Callable

from torch import Tensor, nn

from ffn.nn.attention import LayerCache

NORM_POSITIONS = ("pre", "post")


class Block(nn.Module):
    """One layer of the transformer.

        pre             x = x + attention(norm(x));  x + feed_forward(norm(x))
        post            x = norm(x + attention(x));  norm(x + feed_forward(x))
        pre, parallel   n = norm(x);  x + attention(n) + feed_forward(n)
        post, parallel  norm(x + attention(x) + feed_forward(x))

    Args:
        attention: called as attention(x, rotary, mask, cache). feed_forward: called as feed_forward(x). Both
            (B, T, D) -> (B, T, D); they drop their own output.
        norm: builds one norm over D. A parallel block has one, `attention_norm`; the others have
            `feed_forward_norm` as well.
        norm_position: "pre" or "post".
        parallel: whether both read the same input.

    Raises:
        ValueError: no such norm_position.

    Sources: Vaswani et al. 2017 (post); Xiong et al. 2020 (pre); Wang, Komatsuzaki 2021 (parallel).
    """

    def __init__(
        self,
        attention: nn.Module,
        feed_forward: nn.Module,
        norm: Callable[[], nn.Module],
        *,
        norm_position: str = "pre",
        parallel: bool = False,
    ):
        super().__init__()
        if norm_position not in NORM_POSITIONS:
            raise ValueError(f"norm_position={norm_position!r}: want one of {', '.join(NORM_POSITIONS)}")
        self.norm_position, self.parallel = norm_position, parallel
        self.attention_norm = norm()
        self.attention = attention
        self.feed_forward_norm = None if parallel else norm()
        self.feed_forward = feed_forward

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        norm, second_norm = self.attention_norm, self.feed_forward_norm
        if self.norm_position == "pre":
            n = norm(x)
            if second_norm is None:
                return x + self.attention(n, rotary, mask, cache) + self.feed_forward(n)
            x = x + self.attention(n, rotary, mask, cache)
            return x + self.feed_forward(second_norm(x))
        if second_norm is None:
            return norm(x + self.attention(x, rotary, mask, cache) + self.feed_forward(x))
        x = norm(x + self.attention(x, rotary, mask, cache))
        return second_norm(x + self.feed_forward(x))

    def extra_repr(self) -> str:
        return f"norm_position={self.norm_position!r}, parallel={self.parallel}"
