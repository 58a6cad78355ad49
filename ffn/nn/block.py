"""One layer of the transformer: attention, feed-forward, their norms and the residual stream."""

from collections.abc import Callable

from torch import Tensor, nn

from ffn.nn.attention import LayerCache

NORM_POSITIONS = ("pre", "post", "output", "sandwich")


class Block(nn.Module):
    """One layer of the transformer.

        pre             x = x + attention(norm(x));  x + feed_forward(norm(x))
        post            x = norm(x + attention(x));  norm(x + feed_forward(x))
        output          x = x + norm(attention(x));  x + norm(feed_forward(x))
        sandwich        x = x + norm(attention(norm(x)));  x + norm(feed_forward(norm(x)))
        pre, parallel   n = norm(x);  x + attention(n) + feed_forward(n)
        post, parallel  norm(x + attention(x) + feed_forward(x))

    Args:
        attention: module (B, T, D) -> (B, T, D), called as attention(x, rotary, mask, cache); it applies its
            own output dropout.
        feed_forward: module (B, T, D) -> (B, T, D), called as feed_forward(x); it applies its own output
            dropout.
        norm: builds one norm over D. A parallel block has one, `attention_norm`; other blocks also have
            `feed_forward_norm`, and sandwich blocks an `_out_norm` for each of the two.
        norm_position: "pre", "post", "output" or "sandwich".
        parallel: True if attention and feed_forward read the same input; needs "pre" or "post".
        shared_norm: False to give attention and feed_forward a norm each; needs "pre" and parallel.

    Raises:
        ValueError: if norm_position is unknown, or does not allow parallel or shared_norm.

    Sources: Vaswani et al. 2017 (post); Xiong et al. 2020 (pre); Wang, Komatsuzaki 2021 (parallel); Liu et
    al. 2021 (output); Ding et al. 2021 (sandwich).
    """

    def __init__(
        self,
        attention: nn.Module,
        feed_forward: nn.Module,
        norm: Callable[[], nn.Module],
        *,
        norm_position: str = "pre",
        parallel: bool = False,
        shared_norm: bool = True,
    ):
        super().__init__()
        check_norms(norm_position, parallel, shared_norm)
        self.norm_position, self.parallel = norm_position, parallel
        sandwich = norm_position == "sandwich"
        self.attention_norm = norm()
        self.attention = attention
        self.attention_out_norm = norm() if sandwich else None
        self.feed_forward_norm = None if parallel and shared_norm else norm()
        self.feed_forward = feed_forward
        self.feed_forward_out_norm = norm() if sandwich else None

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        if self.parallel:
            return self._both(x, rotary, mask, cache)
        norm, second_norm = self.attention_norm, self.feed_forward_norm
        assert second_norm is not None
        match self.norm_position:
            case "pre":
                x = x + self.attention(norm(x), rotary, mask, cache)
                return x + self.feed_forward(second_norm(x))
            case "post":
                x = norm(x + self.attention(x, rotary, mask, cache))
                return second_norm(x + self.feed_forward(x))
            case "output":
                x = x + norm(self.attention(x, rotary, mask, cache))
                return x + second_norm(self.feed_forward(x))
        out_norm, second_out_norm = self.attention_out_norm, self.feed_forward_out_norm
        assert out_norm is not None
        assert second_out_norm is not None
        x = x + out_norm(self.attention(norm(x), rotary, mask, cache))
        return x + second_out_norm(self.feed_forward(second_norm(x)))

    def _both(self, x: Tensor, rotary, mask: Tensor | None, cache: LayerCache | None) -> Tensor:
        """Run attention and feed-forward in parallel."""
        if self.norm_position == "post":
            return self.attention_norm(x + self.attention(x, rotary, mask, cache) + self.feed_forward(x))
        n = self.attention_norm(x)
        m = n if self.feed_forward_norm is None else self.feed_forward_norm(x)
        return x + self.attention(n, rotary, mask, cache) + self.feed_forward(m)

    def extra_repr(self) -> str:
        return f"norm_position={self.norm_position!r}, parallel={self.parallel}"


def check_norms(norm_position: str, parallel: bool, shared_norm: bool) -> None:
    """Raise ValueError unless the three options fit together."""
    if norm_position not in NORM_POSITIONS:
        raise ValueError(f"norm_position must be one of {', '.join(NORM_POSITIONS)}, got {norm_position!r}")
    if parallel and norm_position not in ("pre", "post"):
        raise ValueError(f"norm_position must be pre or post with parallel=True, got {norm_position!r}")
    if not (shared_norm or (parallel and norm_position == "pre")):
        raise ValueError("shared_norm=False needs parallel=True and norm_position='pre'")
