"""Compare a block with the op before it is rerouted, and count the bytes that both save for backward."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ffn.interop.swap import source
from ffn.interop.swap.probe import in_short, mode, sizes
from ffn.interop.swap.reroute import Plan, apply
from ffn.interop.swap.standin import run
from ffn.ops.feed_forward import feed_forward

ON_META = "its weights are on the meta device: load them first"
THIN = 8  # input and output width where only the hidden width matters


def prove(module: nn.Module, plan: Plan) -> str | None:
    """Compare the old code with the op in float64, on random thin weights; return a reason, or None if equal.

    The products read and write at most THIN channels: this is cheap at any size, and just as exact.
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
        slopes = _slope(old, x, cotangent), _slope(new, x, cotangent)
        return _difference((old, new), slopes, 1e-9)  # nine digits of hand-written constants


def compare(module: nn.Module, plan: Plan) -> tuple[float, float] | str:
    """Compare both on the module's own weights; return the bytes saved per token (old, new), or a reason."""
    product, chain = module.get_submodule(plan.last), source.inner(type(module), plan.chain)
    x = sample(module, plan)
    if x.is_meta:
        return ON_META

    def old(x: Tensor) -> Tensor:
        return product(run(module, chain, x, {}, plan.last))

    def new(x: Tensor) -> Tensor:
        return apply(module, plan, x)

    if why := difference(module, x, old, new):
        return why
    with mode(module, training=True):
        return _kept(old, x, module), _kept(new, x, module)


def sample(module: nn.Module, plan: Plan, shape: tuple[int, int] = (2, 4)) -> Tensor:
    """Return a random input (*shape, D) in the dtype and on the device of the weights."""
    first = module.get_submodule(plan.first[0])
    assert isinstance(first.weight, Tensor)
    x = torch.randn(*shape, sizes(first)[0], generator=torch.Generator().manual_seed(2), device="cpu")
    return x.to(first.weight.device, first.weight.dtype).requires_grad_()


def difference(module: nn.Module, x: Tensor, old: Callable, new: Callable) -> str | None:
    """Compare outputs and input gradients with the module in eval mode; return a reason, or None if equal.

    They may differ by rounding: by 16 eps of the dtype relative to the norm, 4 eps in half precision.
    """
    limit = max(1e-9, (4 if x.dtype.itemsize == 2 else 16) * torch.finfo(x.dtype).eps)
    with mode(module, training=False):
        given = x + 0  # not a leaf: code that changes its input may run, and is then refused
        try:
            y = old(given)
            if given._version or not torch.equal(given, x):
                return "it changes its input in place"
            g = torch.Generator().manual_seed(3)
            cotangent = torch.randn(y.shape, generator=g, device="cpu").to(y)
            slope = _slope(y, x, cotangent)
        except Exception as error:  # noqa: BLE001 (other people's code may raise anything)
            return f"its code cannot be run on random values ({in_short(error)})"
        z = new(x)
        return _difference((y, z), (slope, _slope(z, x, cotangent)), limit)


def _slope(y: Tensor, x: Tensor, cotangent: Tensor) -> Tensor:
    return torch.autograd.grad(y, x, cotangent)[0]


def _difference(ys: tuple[Tensor, Tensor], slopes: tuple[Tensor, Tensor], limit: float) -> str | None:
    if _apart(*ys) <= limit and _apart(*slopes) <= limit:
        return None
    return f"its numbers differ by {_apart(*ys):.1e} of their norm, gradients by {_apart(*slopes):.1e}"


def _apart(a: Tensor, b: Tensor) -> float:
    """Return norm(a - b) / norm(a), or infinity where that is not a number."""
    a, b = a.detach().double(), b.detach().double()
    scale, difference = float(a.norm()), float((a - b).norm())
    if not difference < float("inf"):
        return float("inf")
    return difference / scale if scale else difference


def _kept(function, x: Tensor, module: nn.Module) -> float:
    """Return the bytes saved for backward per token: each storage once, without the parameters."""
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
