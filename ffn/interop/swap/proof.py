"""That a rerouted block gives the old numbers, compared before it is rerouted; and its saved bytes."""

import torch
from torch import Tensor, nn

from ffn.interop.swap import source
from ffn.interop.swap.probe import mode, sizes
from ffn.interop.swap.reroute import Plan, apply
from ffn.interop.swap.standin import run
from ffn.ops.feed_forward import feed_forward

THIN = 8  # channels read and written where only the hidden width matters


def prove(module: nn.Module, plan: Plan) -> str | None:
    """Compare the old code and the op in float64, on random thin weights and data; why not, or None.

    The products read and write at most THIN channels, so this costs little at any size, and is as exact.
    """
    g = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    D, H = sizes(module.get_submodule(plan.first[0]))[0], sizes(module.get_submodule(plan.last))[0]
    weights = [(random(sizes(module.get_submodule(path))[1], min(D, THIN)), path) for path in plan.first]
    pairs = [(weight, random(len(weight))) for weight, _ in weights]
    down, x = random(THIN, H) / H**0.5, random(2, 3, D).requires_grad_()
    thin = {
        path: lambda x, w=weight, b=bias: nn.functional.linear(x[..., : w.shape[1]], w, b)
        for path, (weight, bias) in zip(plan.first, pairs, strict=True)
    }
    with mode(module, training=False):
        old = run(module, source.inner(type(module), plan.chain), x, thin, plan.last) @ down.t()
        up, gate = plan.arrange(pairs)
        new = feed_forward(
            x[..., :THIN], up[0], down, gate[0], up[1], None, gate[1], activation=plan.inner.activation,
            save=plan.save, chunk_tokens=plan.chunk_tokens, backend="eager",
        )  # fmt: skip
        cotangent = random(*old.shape)
        slopes = [torch.autograd.grad(y, x, cotangent)[0] for y in (old, new)]
    if (
        _apart(old, new) < 1e-9 and _apart(*slopes) < 1e-9
    ):  # constants written with nine digits differ by less
        return None
    return f"its numbers differ in float64 by {_apart(old, new):.1e}, gradients by {_apart(*slopes):.1e}"


def compare(module: nn.Module, plan: Plan) -> tuple[float, float] | str:
    """Compare them on the module's own weights; the bytes a token keeps before and after, or why not.

    The rounding of two ways to the same numbers is allowed: sixteen units of the dtype, relative to the norm
    (four in half precision).
    """
    product = module.get_submodule(plan.last)
    first = module.get_submodule(plan.first[0])
    weight = first.weight
    assert isinstance(weight, Tensor)
    if weight.is_meta:
        return "its weights are on the meta device: load them first"
    g = torch.Generator().manual_seed(2)
    x = torch.randn(2, 4, sizes(first)[0], generator=g).to(weight.device, weight.dtype).requires_grad_()
    chain = source.inner(type(module), plan.chain)

    def old(x: Tensor) -> Tensor:
        return product(run(module, chain, x, {}, plan.last))

    def new(x: Tensor) -> Tensor:
        return apply(module, plan, x)

    with mode(module, training=False):
        ys = [old(x), new(x)]
        cotangent = torch.randn(ys[0].shape, generator=g).to(ys[0])
        slopes = [torch.autograd.grad(y, x, cotangent)[0] for y in ys]
    limit = max(1e-9, (4 if weight.dtype.itemsize == 2 else 16) * torch.finfo(weight.dtype).eps)
    if not (_apart(*ys) <= limit and _apart(*slopes) <= limit):
        return f"its numbers differ by {_apart(*ys):.1e} of their norm, gradients by {_apart(*slopes):.1e}"
    with mode(module, training=True):
        return _kept(old, x, module), _kept(new, x, module)


def _apart(a: Tensor, b: Tensor) -> float:
    """The norm of the difference over that of a; infinite where that is no number."""
    a, b = a.detach().double(), b.detach().double()
    scale, difference = float(a.norm()), float((a - b).norm())
    if not difference < float("inf"):
        return float("inf")
    return difference / scale if scale else difference


def _kept(function, x: Tensor, module: nn.Module) -> float:
    """Bytes a token that autograd holds for backward: each storage once, the parameters not."""
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    storages: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own and t.numel() > 1:
            storages[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = function(x)
    del y
    return sum(storages.values()) / (x.numel() // x.shape[-1])
