"""The named initialisations of Linears, with special cases for Linears that write to the residual stream."""

import math

import torch
from torch import nn

INITS = ("torch", "xavier", "he", "gpt2", "depth_scaled", "zero_out")


def check_init(init: str) -> None:
    """Raise ValueError unless the name is in INITS."""
    if init not in INITS:
        raise ValueError(f"init must be one of {', '.join(INITS)}, got {init!r}")


@torch.no_grad()
def init_linear(
    linear: nn.Linear,
    init: str,
    *,
    residual: bool = False,
    num_layers: int = 1,
    layer: int = 0,
    generator: torch.Generator | None = None,
) -> None:
    """Fill a Linear's weight (out, in) and bias (out) in place; meta tensors stay unchanged.

    Args:
        init: "torch" uniform +-1/sqrt(in), bias too (torch's nn.Linear);
            "xavier" uniform +-sqrt(6/(in+out)), bias 0 (Glorot, Bengio 2010);
            "he" normal sqrt(2/in), bias 0 (He et al. 2015);
            "gpt2" normal 0.02, residual 0.02/sqrt(2 num_layers), bias 0 (Radford et al. 2019);
            "depth_scaled" normal truncated at two sigma, 0.02, residual 0.02/sqrt(2 (layer + 1)), bias 0;
            "zero_out" uniform with standard deviation 1/sqrt(in), residual 0, bias 0: every block starts as
            the identity.
        residual: True if the output is added to the residual stream.
        num_layers: the number of layers of the model.
        layer: the index of this layer, from 0.
        generator: the source of random numbers; torch's global generator by default.

    Raises:
        ValueError: if init is not in INITS.
    """
    check_init(init)
    weight, bias = linear.weight, linear.bias
    if weight.is_meta:
        return
    bound = 1.0 / math.sqrt(max(weight.shape[1], 1))
    match init:
        case "torch":
            weight.uniform_(-bound, bound, generator=generator)
        case "xavier":
            nn.init.xavier_uniform_(weight, generator=generator)
        case "he":
            weight.normal_(0.0, math.sqrt(2.0) * bound, generator=generator)
        case "gpt2":
            std = 0.02 / math.sqrt(2 * num_layers) if residual else 0.02
            weight.normal_(0.0, std, generator=generator)
        case "depth_scaled":
            std = 0.02 / math.sqrt(2 * (layer + 1)) if residual else 0.02
            nn.init.trunc_normal_(weight, 0.0, std, -2 * std, 2 * std, generator=generator)
        case "zero_out" if residual:
            weight.zero_()
        case "zero_out":
            weight.uniform_(-math.sqrt(3.0) * bound, math.sqrt(3.0) * bound, generator=generator)
    if bias is not None:
        bias.uniform_(-bound, bound, generator=generator) if init == "torch" else bias.zero_()
