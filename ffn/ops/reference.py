"""The textbook feed-forward block: torch only, slow and plain, differentiable any number of times.

It is the oracle of the tests and the formula that double backward, torch.func and torch.export run.
"""

from torch import Tensor
from torch.nn import functional as F

from ffn.activations import Activation


def feed_forward(
    x: Tensor,
    up: Tensor,
    down: Tensor,
    gate: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    gate_bias: Tensor | None = None,
    *,
    activation: Activation,
    noise: Tensor | None = None,
) -> Tensor:
    """y = down(noise * act(up x)), or down(noise * act(gate x) * up x) when gated.

    Args:
        x: (..., D). up, gate: (H, D). down: (O, H). up_bias, gate_bias: (H). down_bias: (O).
        noise: what dropout multiplies the hidden values with, 0 or 1 / (1 - p); (..., H).

    Returns:
        (..., O), in x's dtype.

    Sources: Vaswani et al. 2017, section 3.3; gated forms: Shazeer 2020, "GLU Variants Improve Transformer".
    """
    pre = F.linear(x, up, up_bias)
    h = activation(F.linear(x, gate, gate_bias)) * pre if gate is not None else activation(pre)
    if noise is not None:
        h = h * noise
    return F.linear(h, down, down_bias)
