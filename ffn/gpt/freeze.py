"""What trains of a model: its head, the feed-forward blocks, the last layers, adapters, or everything.

    train_only(model, "last:2")
    print(render_trained(model))

The model is a Transformer or a module that holds one beside a head for its own task, as a classifier does.
That head is new and always trains; without one, "head" is the Transformer's own.

    head       the head alone
    ffn        the feed-forward blocks of every layer
    last:K     the last K blocks and what comes behind them
    lora       the adapters that `ffn.gpt.adapters.add_adapters` put there
    all        everything

What does not train requires no gradient: `ffn.train.optim` gives it no state and no decay, and backward ends
at the first part that trains, so that nothing is kept for what lies before.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from ffn.gpt.transformer import Transformer
from ffn.text_table import columns

CHOICES = "head, ffn, last:K, lora or all"


def train_only(model: nn.Module, what: str, *, frozen_dropout: bool = False) -> None:
    """Let only a part of the model train: sets requires_grad of every parameter, anew each time.

    The frozen prefix (the embedding, if frozen, and the frozen blocks from the first on) stays in eval mode
    whatever `model.train()` says: nothing learns there, and without dropout its features are the same in
    each epoch. Norms have no state and are the same in both modes.

    Args:
        what: "head", "ffn", "last:K", "lora" or "all"; see the top of this page.
        frozen_dropout: let the frozen prefix drop values while training, as the rest does.

    Raises:
        ValueError: no such choice, more layers than there are, adapters that are not there, a head that is
            tied to the embedding and has no weights of its own, or not exactly one Transformer in the model.
    """
    transformer = transformer_in(model)
    last = check_choice(what)
    if last > len(transformer.blocks):
        raise ValueError(f"{what}: the model has {len(transformer.blocks)} layers; want at most so many")
    inside = {id(p) for p in transformer.parameters()}
    outside = {id(p) for p in model.parameters()} - inside
    chosen = {id(p) for part in _chosen(transformer, what, last, not outside) for p in part.parameters()}
    if what == "lora":
        chosen = {id(p) for name, p in transformer.named_parameters() if _part(name) == "adapters"}
        if not chosen:
            raise ValueError("lora: the model has no adapters; call add_adapters(model) first")
    if not chosen and not outside:
        why = "is tied to the embedding, with no weights of its own" if transformer.head else "is absent"
        raise ValueError(f"head: the head of this Transformer {why}; want last:1, for example")
    for p in model.parameters():
        p.requires_grad_(id(p) in chosen or id(p) in outside)
    training = model.training
    transformer.at_rest = () if frozen_dropout else tuple(_frozen_prefix(transformer))
    model.train(training)


def check_choice(what: str) -> int:
    """Raise ValueError unless `what` is a choice of `train_only`; returns K of last:K, else 0."""
    kind, colon, number = what.partition(":")
    if not colon and kind in ("head", "ffn", "lora", "all"):
        return 0
    if kind == "last" and number.isascii() and number.isdecimal() and int(number) > 0:
        return int(number)
    raise ValueError(f"{what!r} is no choice of what trains; want {CHOICES}, with K of 1 or more")


def transformer_in(model: nn.Module) -> Transformer:
    """The one Transformer that a model is or holds; ValueError where there is none, or more than one."""
    found = [module for module in model.modules() if isinstance(module, Transformer)]
    if len(found) != 1:
        raise ValueError(f"{type(model).__name__} holds {len(found)} Transformers; want exactly one")
    return found[0]


def render_trained(model: nn.Module) -> str:
    """How many parameters train and how many are frozen, part by part, as plain text."""
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
    note = f"backward ends before the embedding{blocks}" if parts else "backward goes through everything"
    return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1], note])


def _chosen(transformer: Transformer, what: str, last: int, own_head: bool) -> Iterator[nn.Module]:
    """The parts of a Transformer that train."""
    if what == "all":
        yield transformer
    if what == "ffn":
        yield from (m for name, m in transformer.blocks.named_modules() if name.endswith(".feed_forward"))
    if last:
        yield transformer.blocks[-last:]
        yield transformer.norm
    if (what == "head" or last) and own_head and transformer.head is not None:
        yield transformer.head


def _frozen_prefix(transformer: Transformer) -> list[str]:
    """The names of the parts, from the first on, none of whose parameters requires a gradient."""
    names = ["embedding", *(f"blocks.{i}" for i in range(len(transformer.blocks)))]
    for count, name in enumerate(names):
        if any(p.requires_grad for p in transformer.get_submodule(name).parameters()):
            return names[:count]
    return names


def _part(name: str) -> str:
    """What a parameter of a Transformer belongs to, by its name."""
    words = name.split(".")
    if words[-1].startswith("lora_"):
        return "adapters"
    if words[0] in ("embedding", "head"):
        return words[0]
    for part in ("attention", "feed_forward"):
        if part in words:
            return part.replace("_", "-")
    return "norms"
