"""The feed-forward block: FeedForward holds the weights and runs `ffn.ops.feed_forward` on them."""

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook as has_global_hooks

from ffn import activations
from ffn.nn.init import check_init, init_linear
from ffn.nn.lora import adapted_product
from ffn.nn.plain import plain_parameters
from ffn.ops.arguments import check_options, check_size
from ffn.ops.dense import Dense
from ffn.ops.dropout import check_probability, dropout
from ffn.ops.feed_forward import call, explain
from ffn.ops.lora import LoRA
from ffn.ops.options import Options


def gated_hidden_dim(dim: int, multiple_of: int = 128) -> int:
    """Return 8/3 dim rounded up to a multiple of multiple_of.

    With this hidden width a gated block has as many parameters as a plain block of width 4 dim.

    Raises:
        ValueError: dim or multiple_of is not a positive integer.

    >>> gated_hidden_dim(4096)
    11008

    Source: Shazeer 2020, section 2.
    """
    check_size("dim", dim)
    check_size("multiple_of", multiple_of)
    return -(-8 * dim // (3 * multiple_of)) * multiple_of


PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


class FeedForward(nn.Module):
    """The position-wise feed-forward block of the transformer.

        plain   y = down_proj(dropout(act(up_proj(x))))
        gated   y = down_proj(dropout(act(gate_proj(x)) * up_proj(x)))

    Args:
        dim: width D of the input.
        hidden_dim: width H between the products, used without rounding. Default 4 dim, or
            gated_hidden_dim(dim) when gated.
        dropout: probability to drop a hidden value in training; backward recomputes the mask. Default 0.
        out_dim: width O of the output. Default dim.
        activation: a name (plain: relu leaky_relu relu2 gelu gelu_tanh quick_gelu silu sigmoid tanh mish
            softplus identity; gated: glu bilinear reglu geglu geglu_tanh swiglu), a Hugging Face spelling of
            one, a torch.nn activation (class or instance), or any callable, which runs under plain autograd.
            Default "gelu".
        bias: if True (default), the Linears have biases.
        out_dropout: probability to drop an output value in training. Default 0.
        save: "preact" (default) saves x and the preactivations for backward, D + H elements per token (D + 2H
            when gated); "input" saves x alone and repeats the first product in backward.
        chunk_tokens: with save="input", compute this many tokens at a time. Default None: all at once.
        backend: "auto" (default), "eager", "triton" or "reference"; see `ffn.ops.feed_forward` and `explain`.
        init: torch (default), xavier, he, gpt2, depth_scaled or zero_out; see `ffn.nn.init`.

    Shape:
        x (..., D) -> (..., O); any leading shape. x has the weights' dtype and device, except under autocast.

    Raises:
        ValueError, TypeError: an option or an input does not fit.

    The children are plain `nn.Linear`s named gate_proj (when gated), up_proj and down_proj. While all are
    plain or have LoRA adapters (`ffn.gpt.adapters`), the op reads their weights. If one is replaced, hooked,
    parametrized or quantized, forward calls the children instead.

    >>> FeedForward(512, 2048, 0.1)(torch.randn(2, 7, 512)).shape
    torch.Size([2, 7, 512])

    Sources: Vaswani et al. 2017, section 3.3; Shazeer 2020.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int | None = None,
        dropout: float = 0.0,
        *,
        out_dim: int | None = None,
        activation="gelu",
        bias: bool = True,
        out_dropout: float = 0.0,
        save: str = "preact",
        chunk_tokens: int | None = None,
        backend: str = "auto",
        init: str = "torch",
        device=None,
        dtype=None,
    ):
        super().__init__()
        row = activations.resolve(activation)
        check_options(row, dropout, save, chunk_tokens, backend)
        check_probability("out_dropout", out_dropout)
        check_init(init)
        check_size("dim", dim)
        for name, size in (("hidden_dim", hidden_dim), ("out_dim", out_dim)):
            if size is not None:
                check_size(name, size)
        self.dim, self.out_dim = dim, dim if out_dim is None else out_dim
        if hidden_dim is None:
            hidden_dim = gated_hidden_dim(dim) if row.gated else 4 * dim
        self.hidden_dim = hidden_dim
        self.dropout, self.out_dropout = dropout, out_dropout
        self.save, self.chunk_tokens, self.backend, self.init = save, chunk_tokens, backend, init
        self.activation = row.name
        self.act = None if row.formula else row.forward  # the user's callable; a module becomes a child
        if isinstance(self.act, nn.Module):
            self.act.to(device=device, dtype=dtype)
        linear = {"bias": bias, "device": device, "dtype": dtype}
        self.gate_proj = nn.Linear(dim, self.hidden_dim, **linear) if row.gated else None
        self.up_proj = nn.Linear(dim, self.hidden_dim, **linear)
        self.down_proj = nn.Linear(self.hidden_dim, self.out_dim, **linear)
        if init != "torch":  # nn.Linear has already drawn these
            self.reset_parameters()

    def reset_parameters(
        self, *, num_layers: int = 1, layer: int = 0, generator: torch.Generator | None = None
    ) -> None:
        """Draw the weights again with `init`, for layer `layer` of `num_layers`."""
        for linear in self._linears():
            residual = linear is self.down_proj
            where = {"num_layers": num_layers, "layer": layer, "generator": generator}
            init_linear(linear, self.init, residual=residual, **where)

    def forward(self, x: Tensor) -> Tensor:
        products = self.products(x)
        if type(products) is tuple:
            y = call(x, products, self._options())
        else:
            self._check_backend(products)  # pyright: ignore[reportArgumentType]
            y = self._through_children(x)
        return dropout(y, self.out_dropout) if self.training and self.out_dropout else y

    def _options(self) -> Options:
        p = self.dropout if self.training else 0.0
        return Options(self.activation, p, self.save, self.chunk_tokens, self.backend)

    def _through_children(self, x: Tensor) -> Tensor:
        if self.gate_proj is None and "gate_proj" in self._modules:
            raise TypeError(
                f"gate_proj must be a module for the gated activation {self.activation}, got None"
            )
        act = activations.TABLE[self.activation] if self.act is None else self.act
        pre = self.up_proj(x)
        h = act(pre) if self.gate_proj is None else act(self.gate_proj(x)) * pre
        return self.down_proj(dropout(h, self.dropout, self.training))

    def _linears(self) -> list[nn.Linear]:
        return [linear for name in PROJECTIONS if (linear := getattr(self, name)) is not None]

    def products(self, x: Tensor) -> tuple | str:
        """Return the products (up, down, gate) for the op, or the reason why forward must call the children.

        This runs at each call, so that an adapter, hook or quantized weight added later takes effect.
        """
        if self.act is not None:
            return f"{self.activation} is not in the table of activations"
        if type(x) is not Tensor and type(x) is not nn.Parameter:
            return f"the input is a {type(x).__name__}"
        if x.is_nested:
            return "the input is nested"
        if has_global_hooks():
            return "a hook is registered for all modules"
        children = self._modules  # faster than attribute access
        up, down, gate = _product(children["up_proj"]), _product(children["down_proj"]), None
        if up is None or down is None:
            return _not_plain("down_proj" if up else "up_proj", children)
        if "gate_proj" in children:
            gate = _product(children["gate_proj"])
            if gate is None:
                return _not_plain("gate_proj", children)
        return up, down, gate

    def _check_backend(self, reason: str) -> None:
        """Raise ValueError if backend is "triton" although the children must be called."""
        if self.backend == "triton":
            raise ValueError(f"backend must be 'auto', got 'triton': {reason}")

    def explain(self, x: Tensor) -> str:
        """Return one line: the path and backend for x, the reason, and the elements saved per token.

        Raises:
            ValueError, TypeError: those that forward would raise before it computes.
        """
        owner = getattr(self.forward, "__self__", self)  # another object after `ffn.pack`
        line = owner.explain(x) if owner is not self and hasattr(owner, "explain") else None
        if line is not None:
            return line
        products = self.products(x)
        if isinstance(products, str):
            self._check_backend(products)
            unheld = "" if self.save == "preact" else f"; save={self.save!r} has no effect here"
            return f"children: {products}{unheld}"
        choice = explain(x, products, self._options())
        if choice.backend == "reference":
            return f"reference: {choice.reason}"
        kept = len(self._linears()) - 1 if self.save == "preact" else 0
        keeps = f"keeps {self.dim + kept * self.hidden_dim} elements per token for backward"
        return f"{choice.backend}: {choice.reason}; {keeps}"

    def extra_repr(self) -> str:
        name = self.activation if self.act is None else f"{self.activation} (under plain autograd)"
        parts = [f"{self.dim} -> {self.hidden_dim} -> {self.out_dim}", f"activation={name}"]
        usual = {
            "dropout": 0.0,
            "out_dropout": 0.0,
            "save": "preact",
            "chunk_tokens": None,
            "backend": "auto",
        }
        given = {key: getattr(self, key) for key in usual}
        return ", ".join(parts + [f"{key}={value}" for key, value in given.items() if value != usual[key]])


def _not_plain(name: str, children: dict) -> str:
    kind = type(children[name]).__name__
    return f"{name} (a {kind}) is replaced, hooked or parametrized, or its weight is not a plain parameter"


def _product(child: nn.Module | None) -> Dense | LoRA | None:
    """Return the product of a plain Linear or LoRALinear; None if calling the child does anything else."""
    plain = plain_parameters(child)
    return adapted_product(child) if plain is None else Dense(*plain)
