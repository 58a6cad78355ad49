"""Train a part of a model and freeze the rest.

    train_only(model, "last:2")
    print(render_trained(model))

The choices:

    head       the head
    ffn        the feed-forward blocks of every layer
    last:K     the last K blocks, the final norm and the head
    lora       the LoRA adapters of `ffn.gpt.adapters.add_adapters`
    all        everything

The model is a Transformer, or a module that holds one beside a head for its own task, as a classifier does.
Such a task head always trains, and then "head" means the task head.

Frozen parameters require no gradient. `ffn.train.optim` keeps no state for them and does not decay them.
Backward ends at the first part that trains, and nothing before it is saved for backward.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from ffn.gpt.transformer import Transformer
from ffn.text_table import columns

CHOICES = "head, ffn, last:K, lora or all"


def train_only(model: nn.Module, choice: str, *, frozen_dropout: bool = False) -> None:
    """Set requires_grad of every parameter so that only one part trains. Each call replaces the one before.

    The frozen prefix is the embedding and the blocks behind it, up to the first part that trains. It stays in
    eval mode even after `model.train()`: without dropout its outputs are the same in each epoch.

    Args:
        choice: "head", "ffn", "last:K", "lora" or "all"; see the top of this module.
        frozen_dropout: apply dropout in the frozen prefix too while training.

    Raises:
        ValueError: choice is none of these, K exceeds the number of layers, the model has no LoRA adapters or
            no head with weights of its own, or it does not hold exactly one Transformer.
    """
    transformer = transformer_in(model)
    last = check_choice(choice, "choice")
    if last > len(transformer.blocks):
        raise ValueError(f"last:K must be at most last:{len(transformer.blocks)} in this model, got {choice}")
    inside = {id(p) for p in transformer.parameters()}
    outside = {id(p) for p in model.parameters()} - inside
    chosen = {id(p) for part in _chosen(transformer, choice, last, not outside) for p in part.parameters()}
    if choice == "lora":
        chosen = {id(p) for name, p in transformer.named_parameters() if _part(name) == "adapters"}
        if not chosen:
            raise ValueError("lora requires adapters in the model; call add_adapters(model) first")
    if not chosen and not outside:
        got = "a head tied to the embedding" if transformer.head else "no head"
        raise ValueError(f"head requires a head with weights of its own, got {got}; try last:1")
    for p in model.parameters():
        p.requires_grad_(id(p) in chosen or id(p) in outside)
    training = model.training
    transformer.at_rest = () if frozen_dropout else tuple(_frozen_prefix(transformer))
    model.train(training)


def check_choice(choice: str, name: str) -> int:
    """Return K for "last:K" and 0 for the other choices of `train_only`; ValueError for anything else.

    Args:
        name: of the argument or key, for the message.
    """
    kind, colon, number = choice.partition(":")
    if not colon and kind in ("head", "ffn", "lora", "all"):
        return 0
    if kind == "last" and number.isascii() and number.isdecimal() and int(number) > 0:
        return int(number)
    why = "; K must be 1 or more" if kind == "last" else ""
    raise ValueError(f"{name} must be {CHOICES}, got {choice}{why}")


def transformer_in(model: nn.Module) -> Transformer:
    """Return the one Transformer that a model is or holds; ValueError if there is not exactly one."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    found = [module for module in model.modules() if isinstance(module, Transformer)]
    if len(found) != 1:
        raise ValueError(
            f"model must hold exactly one Transformer, got {len(found)} in {type(model).__name__}"
        )
    return found[0]


def render_trained(model: nn.Module) -> str:
    """Return the numbers of trained and frozen parameters of each part as text."""
    transformer = transformer_in(model)
    names = {id(p): name for name, p in transformer.named_parameters()}
    counts: dict[str, list[int]] = {}
    for p in model.parameters():
        part = counts.setdefault(_part(names[id(p)]) if id(p) in names else "task head", [0, 0])
        part[not p.requires_grad] += p.numel()
    trained, frozen = (sum(part[i] for part in counts.values()) for i in (0, 1))
    rows = [("part", "trained", "frozen")]
    rows += [(part, *(f"{n:,}" if n else "-" for n in numbers)) for part, numbers in counts.items()]
    rows.append(("total", f"{trained:,}", f"{frozen:,}"))
    lines = columns(rows)
    rule = "-" * len(lines[0])
    parts = _frozen_prefix(transformer)
    blocks = f" and {len(parts) - 1} of {len(transformer.blocks)} blocks" if len(parts) > 1 else ""
    note = f"backward ends before the embedding{blocks}" if parts else "backward goes through the whole model"
    return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1], note])


def _chosen(transformer: Transformer, choice: str, last: int, own_head: bool) -> Iterator[nn.Module]:
    """Yield the modules of a Transformer that train."""
    if choice == "all":
        yield transformer
    if choice == "ffn":
        yield from (m for name, m in transformer.blocks.named_modules() if name.endswith(".feed_forward"))
    if last:
        yield transformer.blocks[-last:]
        yield transformer.norm
    if (choice == "head" or last) and own_head and transformer.head is not None:
        yield transformer.head


def _frozen_prefix(transformer: Transformer) -> list[str]:
    """Return the names of the parts before the first one that has a parameter to train."""
    names = ["embedding", *(f"blocks.{i}" for i in range(len(transformer.blocks)))]
    for count, name in enumerate(names):
        if any(p.requires_grad for p in transformer.get_submodule(name).parameters()):
            return names[:count]
    return names


def _part(name: str) -> str:
    """Return the part that a parameter of a Transformer belongs to, by the parameter's name."""
    words = name.split(".")
    if words[-1].startswith("lora_"):
        return "adapters"
    if words[0] in ("embedding", "head"):
        return words[0]
    for part in ("attention", "feed_forward"):
        if part in words:
            return part.replace("_", "-")
    return "norms"
