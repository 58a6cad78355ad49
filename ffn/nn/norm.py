"""The norms: torch's modules, and a rule for RMSNorm that trains several times faster on the CPU."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ffn.ops import torch_modes

NORMS = ("rmsnorm", "layernorm", "rmsnorm1p")


def build_norm(name: str, dim: int, eps: float = 1e-5, *, device=None, dtype=None) -> nn.Module:
    """Build a norm over the last dimension D = dim, with a weight (and a bias for layernorm).

    rmsnorm1p stores its weight minus 1, as in Gemma.

    Raises:
        ValueError: if the name is not in NORMS.

    Sources: Ba et al. 2016 (layernorm); Zhang, Sennrich 2019 (rmsnorm).
    """
    if name not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {name!r}")
    norm = {"rmsnorm": RMSNorm, "layernorm": nn.LayerNorm, "rmsnorm1p": RMSNorm1p}[name]
    return norm(dim, eps=eps, device=device, dtype=dtype)


class RMSNorm(nn.RMSNorm):
    """torch.nn.RMSNorm over one dimension, y = x / sqrt(mean(x^2) + eps) * weight, through `rms_norm`."""

    def __init__(self, dim: int, eps: float = 1e-5, *, device=None, dtype=None):
        super().__init__(dim, eps=eps, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class RMSNorm1p(RMSNorm):
    """RMSNorm with the weight 1 + `weight`; half precision is computed in float32, as in Gemma."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        half = x.dtype in (torch.bfloat16, torch.float16)
        wide, weight = (x.float(), self.weight.float()) if half else (x, self.weight)
        return rms_norm(wide, 1.0 + weight, self.eps).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float | None = 1e-5) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight over the last dimension; saves x and one number per row.

    Args:
        x: (..., D) of any floating dtype.
        weight: (D).
        eps: added to the mean; None for the machine epsilon of x's dtype.

    Returns:
        (..., D) in x's dtype.
    """
    if (
        x.device.type == "cpu"  # other devices have a fused kernel, and a compiler writes its own
        and x.dtype == weight.dtype
        and x.dtype in (torch.float32, torch.float64)
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch_modes.needs_reference()
    ):
        return RMSNormRule.apply(x, weight, torch.finfo(x.dtype).eps if eps is None else eps)
    return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)


class RMSNormRule(torch.autograd.Function):
    """r = 1 / sqrt(mean(x^2) + eps), n = x r, y = n w; dw = sum(dy n), dx = r (dy w - n mean(dy w n))."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
        r = square.mul_(1.0 / x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, r)
        ctx.eps = eps
        return (x * r).mul_(weight)

    @staticmethod
    def backward(ctx, *grads):
        (dy,) = grads
        x, weight, r = ctx.saved_tensors
        if torch_modes.wants_autograd(dy):

            def formula(x: Tensor, weight: Tensor) -> Tensor:
                return F.rms_norm(x, weight.shape, weight, ctx.eps)

            return *torch_modes.autograd_gradients(formula, (x, weight), ctx.needs_input_grad[:2], dy), None
        n = x * r
        dyn = (dy * n).reshape(-1, x.shape[-1])
        mean = torch.mv(dyn, weight).view(r.shape).mul_(-1.0 / x.shape[-1])
        return n.mul_(mean).addcmul_(dy, weight).mul_(r), dyn.sum(0), None
