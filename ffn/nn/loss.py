"""The loss: cross entropy from hidden states, without storing all logits of a large vocabulary."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ffn.ops import torch_modes

# 128 MiB in float32: matmuls over about 500 tokens already run at full speed. 512 MiB on a GPU: each chunk
# reads and writes the gradient of the table, which would cost more in smaller chunks.
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
    """Return F.cross_entropy(hidden weight^T + bias, targets), the mean in nats over the counted targets.

    If all logits fit in one chunk, plain torch computes the loss. Otherwise the tokens are processed in
    chunks: each chunk's logits become its part of the gradients and are then freed. The gradients,
    N D + V D elements, are saved for backward, where plain torch saves N V elements and more. No matmul is
    computed twice.

    Args:
        hidden: (..., D).
        weight: (V, D), in hidden's dtype unless autocast is on.
        targets: (...) of any integer dtype, each in [0, V) or ignore_index.
        bias: (V), in weight's dtype; None for no bias.
        softcap: if set, logits z become softcap tanh(z / softcap).
        ignore_index: value of targets that do not count.
        label_smoothing: share of each target spread evenly over the vocabulary.
        chunk_tokens: most tokens in a chunk; by default as many as make 2^25 logits (2^27 on a GPU).

    Returns:
        A scalar in float32 (float64 for float64); nan if no target counts, as in torch.

    Raises:
        ValueError: if shapes do not fit, chunk_tokens is not positive, label_smoothing is outside [0, 1] or a
            target is outside the vocabulary (on the CPU; a GPU raises its own assertion).
        TypeError: if dtypes do not fit.
        RuntimeError: on a second derivative through chunks.

    Source: the derivation is F.cross_entropy's; Hsu et al. 2024 also save gradients instead of logits.
    """
    autocast = torch_modes.autocasts(hidden) and torch_modes.autocasts(weight)
    dtype = torch.get_autocast_dtype(hidden.device.type) if autocast else hidden.dtype
    _check(hidden, weight, bias, targets, chunk_tokens, autocast)
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    hidden, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1).long()
    logits = LOGITS_PER_CHUNK_ON_GPU if hidden.is_cuda else LOGITS_PER_CHUNK
    tokens, most = hidden.shape[0], chunk_tokens or max(1, logits // weight.shape[0])
    whole = tokens <= most or torch_modes.needs_reference()
    step = tokens if whole else -(-tokens // -(-tokens // most))
    options = ChunkOptions(ignore_index, label_smoothing, step, dtype, softcap)
    try:
        return (_at_once if whole else _by_chunks)(hidden, weight, bias, targets, options)
    except (IndexError, RuntimeError):
        _check_range(targets, weight.shape[0], ignore_index)
        raise


def _at_once(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, options: "ChunkOptions"
) -> Tensor:
    logits = cap(_wide(F.linear(hidden, weight, bias)), options.softcap)
    return F.cross_entropy(
        logits, targets, ignore_index=options.ignore_index, label_smoothing=options.smoothing
    )


def _by_chunks(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, options: "ChunkOptions"
) -> Tensor:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (hidden, weight, bias)):
        return ChunkedCrossEntropy.apply(hidden, weight, bias, targets, options)
    total, share, *_ = _in_chunks(hidden, weight, bias, targets, options, (False, False, False))
    return total * share


def cap(logits: Tensor, softcap: float | None) -> Tensor:
    """Return softcap tanh(logits / softcap), or the logits unchanged if softcap is None."""
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def _check_range(targets: Tensor, vocab_size: int, ignore_index: int) -> None:
    """Raise ValueError for a target out of range; called only after a failure, because it costs a pass."""
    if targets.is_cpu:
        wrong = targets[(targets != ignore_index) & ((targets < 0) | (targets >= vocab_size))]
        if wrong.numel():
            rule = f"in [0, {vocab_size}) or ignore_index={ignore_index}"
            raise ValueError(f"targets must be {rule}, got {int(wrong[0])}") from None


def _check(hidden: Tensor, weight: Tensor, bias, targets: Tensor, chunk_tokens: int | None, autocast: bool):
    if targets.shape != hidden.shape[:-1] or weight.ndim != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"hidden, weight and targets must be (..., D), (V, D) and (...), got hidden "
            f"{tuple(hidden.shape)}, weight {tuple(weight.shape)}, targets {tuple(targets.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"bias must be ({weight.shape[0]},), a value per row of weight, got {tuple(bias.shape)}"
        )
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be a positive integer or None, got {chunk_tokens}")
    if hidden.dtype != weight.dtype and not autocast:
        raise TypeError(
            f"hidden and weight must have the same dtype, got {hidden.dtype} and "
            f"{weight.dtype}; cast one with .to(dtype), or use autocast"
        )
    if targets.is_floating_point():
        raise TypeError(f"targets must be integers, got {targets.dtype}; cast with .long()")


class ChunkOptions(NamedTuple):
    """The options of the rule: step is tokens per chunk, dtype that of the matmuls."""

    ignore_index: int
    smoothing: float
    step: int
    dtype: torch.dtype
    softcap: float | None


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


class ChunkedCrossEntropy(torch.autograd.Function):
    """The loss of hidden (N, D), weight (V, D), bias (V), targets (N); forward computes the gradients too.

    With l the log-softmax of a token's logits z, e the smoothing and M the number of counted targets:
        loss = -sum((1 - e) l_target + e mean l) / M        dz = (exp l - (1 - e) onehot - e / V) / M
    With a soft cap, z = cap tanh(...), dz is multiplied by 1 - (z / cap)^2. Backward divides by M, because
    float16 could not hold the divided gradients.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, options: ChunkOptions):
        total, share, *gradients = _in_chunks(
            hidden, weight, bias, targets, options, ctx.needs_input_grad[:3]
        )
        ctx.save_for_backward(share, *gradients)
        ctx.dtype = weight.dtype
        return total * share

    @staticmethod
    def backward(ctx, *grads):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            raise RuntimeError(
                "linear_cross_entropy in chunks has no second derivative; "
                "set chunk_tokens to at least the number of tokens"
            )
        share, dhidden, dweight, dbias = ctx.saved_tensors
        scale = grads[0] * share
        dhidden = None if dhidden is None else dhidden * scale.to(dhidden.dtype)
        dweight = None if dweight is None else (dweight * scale).to(ctx.dtype)
        dbias = None if dbias is None else (dbias * scale).to(ctx.dtype)
        return dhidden, dweight, dbias, None, None


def _in_chunks(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, options: ChunkOptions, wants
):
    """Return the summed loss, 1 / M for M counted targets, and M times each wanted gradient, else None."""
    counts = targets != options.ignore_index
    targets = torch.where(counts, targets, 0)
    share = _wide(hidden.new_ones(())) / counts.sum()
    dhidden = torch.empty_like(hidden) if wants[0] else None
    dweight = torch.zeros_like(weight, dtype=share.dtype) if wants[1] else None
    dbias = torch.zeros_like(bias, dtype=share.dtype) if bias is not None and wants[2] else None
    total = torch.zeros_like(share)
    weight, bias = weight.to(options.dtype), None if bias is None else bias.to(options.dtype)
    for i in range(0, hidden.shape[0], options.step):
        rows = slice(i, i + options.step)
        target, count = targets[rows, None], counts[rows, None]
        x = hidden[rows].to(options.dtype)
        logits = cap(_wide(x @ weight.t() if bias is None else F.linear(x, weight, bias)), options.softcap)
        log_p = logits.log_softmax(-1)
        total += _each(log_p, target, options.smoothing).mul_(count).sum()
        if not any(wants):
            continue
        dz = _dlogits_(log_p, target, options.smoothing)
        if options.softcap is not None:
            dz.mul_(1.0 - (logits / options.softcap).square())
        dz = dz.to(options.dtype)
        if dhidden is not None:
            dhidden[rows] = (dz @ weight).mul_(count)
        if dweight is not None:
            _accumulate(dweight, dz, x * count)
        if dbias is not None:
            dbias += (_wide(dz) * count).sum(0)
    return total, share, dhidden, dweight, dbias


def _each(log_p: Tensor, target: Tensor, smoothing: float) -> Tensor:
    """Return the loss of each token, (n, 1), from its log-probabilities (n, V)."""
    each = (smoothing - 1.0) * log_p.gather(1, target)
    return each - smoothing * log_p.mean(-1, keepdim=True) if smoothing > 0.0 else each


def _dlogits_(log_p: Tensor, target: Tensor, smoothing: float) -> Tensor:
    """Return the gradient of `_each` with respect to the logits (n, V), written over log_p."""
    dz = log_p.exp_()
    if smoothing > 0.0:
        dz.sub_(smoothing / log_p.shape[1])
    return dz.scatter_add_(1, target, dz.new_full(target.shape, smoothing - 1.0))


def _accumulate(total: Tensor, dlogits: Tensor, hidden: Tensor) -> None:
    """Add dlogits^T hidden to total, within the matmul if the dtypes agree."""
    if total.dtype == dlogits.dtype:
        total.addmm_(dlogits.t(), hidden)
    else:
        total.add_(dlogits.t() @ hidden)
