"""The loss: cross entropy straight from hidden states; the logits of a large vocabulary never all exist."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ffn.ops import torch_modes

# 128 MiB in float32, where products over some 500 tokens already run at full speed; 512 MiB on a GPU, where
# the gradient of the table, read and written for each chunk, would cost more than the products save.
LOGITS_PER_CHUNK, LOGITS_PER_CHUNK_ON_GPU = 1 << 25, 1 << 27


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    chunk_tokens: int | None = None,
) -> Tensor:
    """F.cross_entropy(hidden weight^T + bias, targets), in nats, averaged over the targets that count.

    When all logits fit one chunk it is just that. Otherwise the tokens are taken a chunk at a time and each
    chunk's logits are turned into its part of the gradients before they are dropped: what is kept for
    backward are the gradients themselves, N D + V D elements, where plain torch keeps N V and more. No
    product is computed twice.

    Args:
        hidden: (..., D). weight: (V, D), of hidden's dtype unless autocast is on.
        bias: (V), of weight's dtype; None for none.
        softcap: logits z become softcap tanh(z / softcap); None leaves them.
        targets: (...) int64 or another integer dtype, 0 <= target < V or ignore_index.
        ignore_index: targets that do not count.
        label_smoothing: share of each target spread evenly over the vocabulary.
        chunk_tokens: tokens a chunk at most; left out, as many as make 2^25 logits (2^27 on a GPU).

    Returns:
        a scalar, float32 (float64 for float64); nan when no target counts, as in torch.

    Raises:
        ValueError: shapes that do not fit, chunks of no tokens, a smoothing outside [0, 1], a target outside
            the vocabulary (on the CPU; a GPU asserts by itself). TypeError: dtypes that do not fit.
        RuntimeError: a second derivative through chunks.

    Source: the derivation is F.cross_entropy's; Hsu et al. 2024 keep gradients instead of logits likewise.
    """
    autocast = torch_modes.autocasts(hidden) and torch_modes.autocasts(weight)
    dtype = torch.get_autocast_dtype(hidden.device.type) if autocast else hidden.dtype
    _check(hidden, weight, bias, targets, chunk_tokens, autocast)
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing={label_smoothing}: want a share in [0, 1]")
    hidden, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1).long()
    logits = LOGITS_PER_CHUNK_ON_GPU if hidden.is_cuda else LOGITS_PER_CHUNK
    tokens, most = hidden.shape[0], chunk_tokens or max(1, logits // weight.shape[0])
    whole = tokens <= most or torch_modes.needs_textbook()
    step = tokens if whole else -(-tokens // -(-tokens // most))
    plan = Plan(ignore_index, label_smoothing, step, dtype, softcap)
    try:
        return (_at_once if whole else _by_chunks)(hidden, weight, bias, targets, plan)
    except (IndexError, RuntimeError):
        _check_range(targets, weight.shape[0], ignore_index)
        raise


def _at_once(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, plan: "Plan") -> Tensor:
    logits = cap(_wide(F.linear(hidden, weight, bias)), plan.softcap)
    return F.cross_entropy(logits, targets, ignore_index=plan.ignore_index, label_smoothing=plan.smoothing)


def _by_chunks(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, plan: "Plan") -> Tensor:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (hidden, weight, bias)):
        return ChunkedCrossEntropy.apply(hidden, weight, bias, targets, plan)
    total, share, *_ = _in_chunks(hidden, weight, bias, targets, plan, (False, False, False))
    return total * share


def cap(logits: Tensor, softcap: float | None) -> Tensor:
    """softcap tanh(logits / softcap), or the logits as they are."""
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def _check_range(targets: Tensor, vocab_size: int, ignore_index: int) -> None:
    """Asked once the loss has failed: until then the answer would cost a pass, and on a GPU a wait."""
    if targets.is_cpu:
        wrong = targets[(targets != ignore_index) & ((targets < 0) | (targets >= vocab_size))]
        if wrong.numel():
            rule = f"0 <= target < {vocab_size} or ignore_index={ignore_index}"
            raise ValueError(f"targets want {rule}; got {int(wrong[0])}") from None


def _check(hidden: Tensor, weight: Tensor, bias, targets: Tensor, chunk_tokens: int | None, autocast: bool):
    if targets.shape != hidden.shape[:-1] or weight.ndim != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"linear_cross_entropy wants hidden (..., D), weight (V, D), targets (...); got hidden "
            f"{tuple(hidden.shape)}, weight {tuple(weight.shape)}, targets {tuple(targets.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        got = f"{tuple(bias.shape)} with weight {tuple(weight.shape)}"
        raise ValueError(f"linear_cross_entropy wants bias (V); got {got}")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens={chunk_tokens}: want at least 1, or None")
    if hidden.dtype != weight.dtype and not autocast:
        raise TypeError(
            f"linear_cross_entropy wants hidden and weight of one dtype; got {str(hidden.dtype)[6:]} and "
            f"{str(weight.dtype)[6:]}; cast one with .to(dtype), or use autocast"
        )
    if targets.is_floating_point():
        raise TypeError(f"targets want integers; got {str(targets.dtype)[6:]}; cast with .long()")


class Plan(NamedTuple):
    """What the rule must know besides tensors; step: tokens a chunk, dtype: of the products."""

    ignore_index: int
    smoothing: float
    step: int
    dtype: torch.dtype
    softcap: float | None


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


class ChunkedCrossEntropy(torch.autograd.Function):
    """The rule over hidden (N, D), weight (V, D), bias (V), targets (N): forward computes the gradients too.

    With l the log-softmax of a token's logits z, e the smoothing and M the number of targets that count:
        loss = -sum((1 - e) l_target + e mean l) / M        dz = (exp l - (1 - e) onehot - e / V) / M
    and times 1 - (z / cap)^2 where z = cap tanh(...) is capped.
    The gradients' division by M waits for backward: float16 could not hold them in between.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, plan: Plan):
        total, share, *gradients = _in_chunks(hidden, weight, bias, targets, plan, ctx.needs_input_grad[:3])
        ctx.save_for_backward(share, *gradients)
        ctx.dtype = weight.dtype
        return total * share

    @staticmethod
    def backward(ctx, *grads):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            raise RuntimeError(
                "linear_cross_entropy in chunks cannot be differentiated twice; "
                "pass chunk_tokens as large as the number of tokens"
            )
        share, dhidden, dweight, dbias = ctx.saved_tensors
        scale = grads[0] * share
        dhidden = None if dhidden is None else dhidden * scale.to(dhidden.dtype)
        dweight = None if dweight is None else (dweight * scale).to(ctx.dtype)
        dbias = None if dbias is None else (dbias * scale).to(ctx.dtype)
        return dhidden, dweight, dbias, None, None


def _in_chunks(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, plan: Plan, wants):
    """The summed loss, 1 / M where M targets count, and M times the gradients that are wanted, else None."""
    counts = targets != plan.ignore_index
    targets = torch.where(counts, targets, 0)
    share = _wide(hidden.new_ones(())) / counts.sum()
    dhidden = torch.empty_like(hidden) if wants[0] else None
    dweight = torch.zeros_like(weight, dtype=share.dtype) if wants[1] else None
    dbias = torch.zeros_like(bias, dtype=share.dtype) if bias is not None and wants[2] else None
    total = torch.zeros_like(share)
    weight, bias = weight.to(plan.dtype), None if bias is None else bias.to(plan.dtype)
    for i in range(0, hidden.shape[0], plan.step):
        rows = slice(i, i + plan.step)
        target, count = targets[rows, None], counts[rows, None]
        x = hidden[rows].to(plan.dtype)
        logits = cap(_wide(x @ weight.t() if bias is None else F.linear(x, weight, bias)), plan.softcap)
        log_p = logits.log_softmax(-1)
        total += _each(log_p, target, plan.smoothing).mul_(count).sum()
        if not any(wants):
            continue
        dz = _dlogits_(log_p, target, plan.smoothing)
        if plan.softcap is not None:
            dz.mul_(1.0 - (logits / plan.softcap).square())
        dz = dz.to(plan.dtype)
        if dhidden is not None:
            dhidden[rows] = (dz @ weight).mul_(count)
        if dweight is not None:
            _accumulate(dweight, dz, x * count)
        if dbias is not None:
            dbias += (_wide(dz) * count).sum(0)
    return total, share, dhidden, dweight, dbias


def _each(log_p: Tensor, target: Tensor, smoothing: float) -> Tensor:
    """The loss of each token, (n, 1), from its log-probabilities (n, V)."""
    each = (smoothing - 1.0) * log_p.gather(1, target)
    return each - smoothing * log_p.mean(-1, keepdim=True) if smoothing > 0.0 else each


def _dlogits_(log_p: Tensor, target: Tensor, smoothing: float) -> Tensor:
    """The gradient of `_each` to the logits (n, V), written over log_p."""
    dz = log_p.exp_()
    if smoothing > 0.0:
        dz.sub_(smoothing / log_p.shape[1])
    return dz.scatter_add_(1, target, dz.new_full(target.shape, smoothing - 1.0))


def _accumulate(total: Tensor, dlogits: Tensor, hidden: Tensor) -> None:
    """total += dlogits^T hidden, which the product itself can do when the dtypes agree."""
    if total.dtype == dlogits.dtype:
        total.addmm_(dlogits.t(), hidden)
    else:
        total.add_(dlogits.t() @ hidden)
