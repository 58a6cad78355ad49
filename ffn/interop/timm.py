"""timm's feed-forward blocks with less kept for backward: its names, signatures, defaults and state dicts.

    VisionTransformer(..., mlp_layer=ffn.interop.timm.Mlp)

Dropouts stand where timm has them: `drop1` before fc2, `drop2` after it; a norm stands between drop1 and fc2.
The children are timm's. While they are plain Linears, with an activation of the table and no norm, their
weights go to the op, which keeps D + H elements a token (D + 2 H where gated); otherwise (a norm, 1x1
convolutions, adapters, hooks, any other activation) the children themselves are called.

Source: timm 1.0, `timm.layers.mlp`. timm itself is not imported.
"""

from collections.abc import Callable, Iterable
from functools import partial

from torch import Tensor, nn

from ffn.interop.swap.plain_modules import drop, fused


class Mlp(nn.Module):
    """fc2(norm(drop1(act(fc1(x))))), then drop2.

    Args:
        in_features, hidden_features, out_features: widths D, H and O; what is left out (or 0) is in_features.
        act_layer: builds the activation, or is one already.
        norm_layer: builds the norm from H, device and dtype.
        bias, drop: one for both places, or a pair.
        use_conv: whether fc1 and fc2 are 1x1 convolutions, for x (B, D, height, width).

    Shape:
        x (..., D) -> (..., O), in the weights' dtype and device (or under autocast).

    >>> Mlp(192, 768, drop=0.1)(torch.randn(2, 7, 192)).shape
    torch.Size([2, 7, 192])
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: Callable[..., nn.Module] = nn.GELU,
        norm_layer: Callable[..., nn.Module] | None = None,
        bias: bool | tuple[bool, bool] = True,
        drop: float | tuple[float, float] = 0.0,
        use_conv: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        place = {"device": device, "dtype": dtype}
        hidden, out = hidden_features or in_features, out_features or in_features
        linear, biases, drops = _linear(use_conv), _pair(bias), _pair(drop)
        self.fc1 = linear(in_features, hidden, bias=biases[0], **place)
        self.act = _activation(act_layer)
        self.drop1 = nn.Dropout(drops[0])
        self.norm = nn.Identity() if norm_layer is None else norm_layer(hidden, **place)
        self.fc2 = linear(hidden, out, bias=biases[1], **place)
        self.drop2 = nn.Dropout(drops[1])

    def forward(self, x: Tensor) -> Tensor:
        y = fused(x, self.act, self.fc1, self.fc2, between=(self.drop1, self.norm))
        if y is None:
            y = self.fc2(self.norm(self.drop1(self.act(self.fc1(x)))))
        return drop(y, self.drop2)


class GluMlp(nn.Module):
    """fc2(norm(drop1(a * act(b)))), or act(a) * b unless gate_last, of the halves a, b of fc1(x); then drop2.

    Args:
        hidden_features: width 2 H of fc1, even: what remains after the gate is half of it.
        gate_last: whether the second half of fc1 is the gate.
        The others as in `Mlp`.

    Raises:
        ValueError: an odd hidden_features.

    >>> GluMlp(192, 1024)(torch.randn(2, 7, 192)).shape
    torch.Size([2, 7, 192])

    Sources: Dauphin et al. 2017; Shazeer 2020.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: Callable[..., nn.Module] = nn.Sigmoid,
        norm_layer: Callable[..., nn.Module] | None = None,
        bias: bool | tuple[bool, bool] = True,
        drop: float | tuple[float, float] = 0.0,
        use_conv: bool = False,
        gate_last: bool = True,
        device=None,
        dtype=None,
    ):
        super().__init__()
        place = {"device": device, "dtype": dtype}
        both, out = hidden_features or in_features, out_features or in_features
        if both % 2:
            raise ValueError(f"hidden_features={both}: want an even number, half of it is the gate")
        linear, biases, drops = _linear(use_conv), _pair(bias), _pair(drop)
        self.chunk_dim = 1 if use_conv else -1
        self.gate_last = gate_last
        self.fc1 = linear(in_features, both, bias=biases[0], **place)
        self.act = _activation(act_layer)
        self.drop1 = nn.Dropout(drops[0])
        self.norm = nn.Identity() if norm_layer is None else norm_layer(both // 2, **place)
        self.fc2 = linear(both // 2, out, bias=biases[1], **place)
        self.drop2 = nn.Dropout(drops[1])

    def init_weights(self) -> None:
        """Set the second half of fc1 as timm does, whether it is the gate or not: weights near 0, bias 1."""
        half = self.fc1.weight.shape[0] // 2
        if self.fc1.bias is not None:
            nn.init.ones_(self.fc1.bias[half:])
        nn.init.normal_(self.fc1.weight[half:], std=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        packing = "gate_last" if self.gate_last else "gate_first"
        y = fused(x, self.act, self.fc1, self.fc2, packing=packing, between=(self.drop1, self.norm))
        if y is None:
            a, b = self.fc1(x).chunk(2, dim=self.chunk_dim)
            h = a * self.act(b) if self.gate_last else self.act(a) * b
            y = self.fc2(self.norm(self.drop1(h)))
        return drop(y, self.drop2)


SwiGLUPacked = partial(GluMlp, act_layer=nn.SiLU, gate_last=False)


class SwiGLU(nn.Module):
    """fc2(norm(drop1(act(fc1_g(x)) * fc1_x(x)))), then drop2.

    Args:
        align_to: a number of which H is rounded up to a multiple; 0 leaves it.
        The others as in `Mlp`.

    >>> SwiGLU(192, 512, align_to=128)(torch.randn(2, 7, 192)).shape
    torch.Size([2, 7, 192])

    Source: Shazeer 2020.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: Callable[..., nn.Module] = nn.SiLU,
        norm_layer: Callable[..., nn.Module] | None = None,
        bias: bool | tuple[bool, bool] = True,
        drop: float | tuple[float, float] = 0.0,
        align_to: int = 0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        place = {"device": device, "dtype": dtype}
        hidden, out = hidden_features or in_features, out_features or in_features
        if align_to:
            hidden += -hidden % align_to
        biases, drops = _pair(bias), _pair(drop)
        self.fc1_g = nn.Linear(in_features, hidden, bias=biases[0], **place)
        self.fc1_x = nn.Linear(in_features, hidden, bias=biases[0], **place)
        self.act = _activation(act_layer)
        self.drop1 = nn.Dropout(drops[0])
        self.norm = nn.Identity() if norm_layer is None else norm_layer(hidden, **place)
        self.fc2 = nn.Linear(hidden, out, bias=biases[1], **place)
        self.drop2 = nn.Dropout(drops[1])

    def init_weights(self) -> None:
        """Set the gate as timm does: weights near 0, bias 1."""
        if self.fc1_g.bias is not None:
            nn.init.ones_(self.fc1_g.bias)
        nn.init.normal_(self.fc1_g.weight, std=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        y = fused(x, self.act, self.fc1_x, self.fc2, self.fc1_g, between=(self.drop1, self.norm))
        if y is None:
            h = self.act(self.fc1_g(x)) * self.fc1_x(x)
            y = self.fc2(self.norm(self.drop1(h)))
        return drop(y, self.drop2)


def _linear(use_conv: bool) -> Callable[..., nn.Linear | nn.Conv2d]:
    return partial(nn.Conv2d, kernel_size=1) if use_conv else nn.Linear


def _pair(value) -> tuple:
    return tuple(value) if isinstance(value, Iterable) else (value, value)


def _activation(act_layer: Callable[..., nn.Module]) -> nn.Module:
    return act_layer if isinstance(act_layer, nn.Module) else act_layer()
