"""Turn a feed-forward block written elsewhere into a FeedForward that holds its weights."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ffn.interop.swap import source
from ffn.interop.swap.discover import DTYPES, plans, reason_not_found
from ffn.interop.swap.plain_modules import plain_projection
from ffn.interop.swap.probe import dropout_of, in_short, mode, preactivations, sizes, unsteady
from ffn.interop.swap.proof import ON_META, difference, sample
from ffn.interop.swap.reroute import Plan, Rerouted, rate, tail_of
from ffn.interop.swap.standin import StandIn
from ffn.nn.feed_forward import FeedForward
from ffn.nn.plain import is_hooked

MORE = "its forward does more than compute one feed-forward block"


def from_module(module: nn.Module) -> FeedForward:
    """Return a FeedForward with the weights of `module`, a feed-forward block from another library.

    Parameters with the same layout are shared: an optimizer that has them goes on, and a change in one block
    shows in the other. Parameters with another layout are copied: the weights of transformers' Conv1D, which
    are (in, out), and the halves of a packed gate and up.

    Activation, dropout rates, the bias of each Linear, dtype, device, requires_grad and training mode are
    those of the module. To choose `save`, `chunk_tokens` or `backend`, set these attributes of the result.

    Args:
        module: for example nn.Sequential(Linear, GELU, Dropout, Linear), transformers' LlamaMLP, GPT2MLP or
            Phi3MLP, timm's Mlp, or your own class. It is unchanged. A FeedForward is returned as it is.

    Returns:
        A FeedForward, after its outputs and input gradients were compared with the module's.

    Raises:
        TypeError: module is not an nn.Module.
        ValueError: module is not exactly one block, or FeedForward cannot compute it; the message says why.

    >>> from_module(nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8), nn.Dropout(0.1)))
    FeedForward(
      8 -> 32 -> 8, activation=gelu, out_dropout=0.1
      (up_proj): Linear(in_features=8, out_features=32, bias=True)
      (down_proj): Linear(in_features=32, out_features=8, bias=True)
    )
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be an nn.Module, got {type(module).__name__}")
    if isinstance(module, FeedForward):
        return module
    found = _convert(module)
    if isinstance(found, str):
        raise ValueError(f"module must be one feed-forward block, got {type(module).__name__}: {found}")
    return found


def _convert(module: nn.Module) -> FeedForward | str:
    """Return the FeedForward, or the reason for none."""
    if isinstance(module, Rerouted):
        return "it is swapped: call ffn.unswap first"
    if len({part.training for part in module.modules()}) > 1:
        return "some of its parts are in training mode and some in eval mode"
    for path, part in module.named_modules():
        if is_hooked(part) or "forward" in vars(part):
            return f"{path or 'the module'} has a hook or a forward of its own"
    reason = None
    for plan in plans(module):
        if isinstance(plan, Plan):
            return _from_plan(module, plan)
        reason = plan
    return reason or reason_not_found(module)


def _from_plan(module: nn.Module, plan: Plan) -> FeedForward | str:
    if plan.chain.method != "forward":
        return MORE
    with torch.device("cpu"):
        out_dropout = _out_dropout(module, plan)
    if isinstance(out_dropout, str):
        return out_dropout
    block = _build(module, plan, out_dropout).eval()
    for shape in ((2, 4), (1, 1)):
        x = sample(module, plan, shape)
        if why := ON_META if x.is_meta else difference(module, x, module, block):
            return why
    return block.train(module.training)


def _out_dropout(module: nn.Module, plan: Plan) -> float | str:
    """Return the rate of the dropout after the block (0.0 without one), or a reason if forward does more.

    The module's forward runs with a function in place of the block, which returns values chosen here: in eval
    mode in each dtype with its largest values, infinity and NaN, with gradients on and off; in training mode
    values up to 1e4 in float64. Code that acts only on other shapes than these is not noticed.
    """
    width = sizes(module.get_submodule(plan.first[0]))[0]
    (y,) = preactivations([sizes(module.get_submodule(plan.last))[1]])
    x = torch.rand(*y.shape[:-1], width, generator=torch.Generator().manual_seed(4), dtype=y.dtype)
    seen: dict[str, Any] = {}
    forward = source.rewrite(type(module), plan.chain)

    def around(x: Tensor, y: Tensor) -> tuple[Tensor, bool]:
        """Return the output where the block returns y; and whether the block was called once, on x."""
        inputs: list[Tensor] = []

        def block(x: Tensor) -> Tensor:
            inputs.append(x)
            return y.clone()

        functions = {source.REROUTE: block, source.TAIL: tail_of(module, plan)}
        out = forward(StandIn(module, functions, seen), x.clone())
        return out, len(inputs) == 1 and _equal(inputs[0], x)

    try:
        with mode(module, training=False):
            same = all(_passes(around, x, y, dtype) for dtype in DTYPES)
        with mode(module, training=True):
            torch.default_generator.manual_seed(0)
            dropped, once = around(x, y)
            place = dropout_of(y, dropped, [y], seen)
    except Exception as error:  # noqa: BLE001 (other people's code may raise anything)
        return f"{MORE} ({in_short(error)})"
    if not (same and once) or unsteady(seen):
        return MORE
    return place if isinstance(place, str) else rate(module, place)


def _passes(around: Callable, x: Tensor, y: Tensor, dtype: torch.dtype) -> bool:
    """Return whether x reaches the block, and y the output, unchanged in this dtype, up to its extremes."""
    x, y = x.to(dtype, copy=True), y.detach().to(dtype, copy=True)
    top = torch.finfo(dtype).max
    extremes = torch.tensor([torch.nan, top, -top, torch.inf, -torch.inf], dtype=dtype)
    for values in (x, y):
        count = min(len(extremes), values.numel())
        values.view(-1)[:count] = extremes[:count]
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            out, once = around(x, y)
        if not once or not _equal(out, y):
            return False
    return True


def _equal(a: Tensor, b: Tensor) -> bool:
    """Return whether both have the same dtype, shape and values, where NaN equals NaN."""
    same = a.dtype == b.dtype and a.shape == b.shape
    return same and bool(((a == b) | (a.isnan() & b.isnan())).all())


def _build(module: nn.Module, plan: Plan, out_dropout: float) -> FeedForward:
    with torch.enable_grad():  # a view made under no_grad would not require a gradient
        up, gate = plan.arrange([plain_projection(module.get_submodule(path)) for path in plan.first])
        down = plain_projection(module.get_submodule(plan.last))
        children = {"gate_proj": gate, "up_proj": up, "down_proj": down}
        linears = {name: _linear(*pair) for name, pair in children.items() if pair[0] is not None}
    block = FeedForward(
        linears["up_proj"].in_features, linears["up_proj"].out_features, rate(module, plan.inner.dropout),
        out_dim=linears["down_proj"].out_features, activation=plan.inner.activation, out_dropout=out_dropout,
        device="meta",
    )  # fmt: skip
    for name, linear in linears.items():
        setattr(block, name, linear)
    return block


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Return a Linear that holds these Parameters, or copies where they are views of Parameters."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None and type(value) is not nn.Parameter:
            copied = value.detach().clone(memory_format=torch.contiguous_format)
            value = nn.Parameter(copied, value.requires_grad)
        setattr(linear, name, value)
    return linear
