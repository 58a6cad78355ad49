"""The reference feed-forward block: plain torch ops, differentiable any number of times.

The tests compare against it. Double backward, torch.func and torch.export run it.
"""

from collections.abc import Callable

from torch import Tensor

Product = Callable[[Tensor], Tensor]


def feed_forward(
    x: Tensor,
    up: Product,
    down: Product,
    gate: Product | None = None,
    *,
    activation: Callable[[Tensor], Tensor],
    noise: Tensor | None = None,
) -> Tensor:
    """Return down(noise * act(up x)), or down(noise * act(gate x) * up x) when gated.

    Args:
        x: (..., D).
        up, gate: callables (..., D) -> (..., H), such as nn.Linear.
        down: a callable (..., H) -> (..., O).
        activation: a callable on the preactivations.
        noise: (..., H), factors for the hidden values: 0 or 1 / (1 - p) for dropout.

    Returns:
        (..., O), in x's dtype.

    Sources: Vaswani et al. 2017, section 3.3; gated forms: Shazeer 2020, "GLU Variants Improve Transformer".
    """
    return down(hidden(up(x), None if gate is None else gate(x), activation, noise))


def hidden(
    pre: Tensor, pre_gate: Tensor | None, activation: Callable[[Tensor], Tensor], noise: Tensor | None
) -> Tensor:
    """Return the hidden values (..., H) for the preactivations (..., H)."""
    h = activation(pre) if pre_gate is None else activation(pre_gate) * pre
    return h if noise is None else h * noise
