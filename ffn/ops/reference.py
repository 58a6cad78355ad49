"""The textbook feed-forward block: torch only, slow and plain, differentiable any number of times.

It is the oracle of the tests and the formula that double backward, torch.func and torch.export run.
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
    """y = down(noise * act(up x)), or down(noise * act(gate x) * up x) when gated.

    Args:
        x: (..., D). up, gate: (..., D) -> (..., H) and down: (..., H) -> (..., O), such as nn.Linear.
        noise: factors of the hidden values, 0 or 1 / (1 - p) for dropout; (..., H).

    Returns:
        (..., O), in x's dtype.

    Sources: Vaswani et al. 2017, section 3.3; gated forms: Shazeer 2020, "GLU Variants Improve Transformer".
    """
    return down(hidden(up(x), None if gate is None else gate(x), activation, noise))


def hidden(
    pre: Tensor, pre_gate: Tensor | None, activation: Callable[[Tensor], Tensor], noise: Tensor | None
) -> Tensor:
    """The hidden values (..., H) of the preactivations (..., H)."""
    h = activation(pre) if pre_gate is None else activation(pre_gate) * pre
    return h if noise is None else h * noise
