"""A Linear with a LoRA adapter: a trainable low-rank product added to the Linear's own."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ffn.nn.plain import is_hooked
from ffn.ops.dropout import dropout
from ffn.ops.lora import LoRA


class LoRALinear(nn.Linear):
    """y = x weight^T + bias + scale drop(x) lora_A^T lora_B^T, with scale = alpha / rank.

    It shares the weight and bias of `linear`. lora_A (r, in) is uniform in ±1/sqrt(in) and lora_B (out, r) is
    zero, so a new adapter does not change the outputs.

    Args:
        linear: a plain nn.Linear.
        rank: r.
        alpha: sets the scale, alpha / rank.
        dropout: probability to drop an input value of lora_A in training. Default 0.

    Shape:
        x (..., in) -> (..., out).

    Source: Hu et al. 2021.
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, dropout: float = 0.0):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.rank, self.scale, self.dropout = rank, alpha / rank, dropout
        self.lora_A = nn.Parameter(self.weight.new_empty(rank, self.in_features))
        self.lora_B = nn.Parameter(self.weight.new_zeros(self.out_features, rank))
        if not self.weight.is_meta:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        dropped = dropout(x, self.dropout, self.training)
        a, b = self.lora_A.to(x.dtype), self.lora_B.to(x.dtype)
        return F.linear(x, self.weight, self.bias) + self.scale * F.linear(F.linear(dropped, a), b)

    def plain(self) -> nn.Linear:
        """Return a plain Linear that shares this one's weight and bias, without the adapter."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight, linear.bias = self.weight, self.bias
        return linear.train(self.training)

    @torch.no_grad()
    def merge(self) -> None:
        """Add scale lora_B lora_A to the weight in place, computed in float32 or wider and rounded once."""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        gain = self.lora_B.to(wide) @ self.lora_A.to(wide)
        self.weight.copy_(self.weight.to(wide).add_(gain, alpha=self.scale))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}, scale={self.scale}, dropout={self.dropout}"


def adapted_product(linear: nn.Module | None) -> LoRA | None:
    """Return the product of a LoRALinear, or None if calling the module does anything else."""
    if type(linear) is not LoRALinear or "forward" in linear.__dict__ or is_hooked(linear):
        return None
    if any(p is not None and type(p) is not nn.Parameter for p in linear._parameters.values()):
        return None
    p = linear.dropout if linear.training else 0.0
    return LoRA(linear.weight, linear.bias, linear.lora_A, linear.lora_B, None, linear.scale, p)
