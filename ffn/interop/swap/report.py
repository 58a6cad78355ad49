"""The report of `ffn.swap`: one entry per block, printed as a table."""

import re
from dataclasses import dataclass

from ffn.interop.swap.reroute import Plan
from ffn.text_table import columns


@dataclass(frozen=True)
class BlockReport:
    """One feed-forward block of a model.

    path, kind: the path of the module in the model, and the name of its class.
    action: "swapped" or "left". reason: why it was left.
    what: the activation, the packing and "dropout", as far as they are known.
    before, after: bytes of activations saved for backward per token.
    """

    path: str
    kind: str
    action: str
    reason: str = ""
    what: str = ""
    before: float = 0.0
    after: float = 0.0


class Report(list[BlockReport]):
    """The blocks in the order of the model. As text: a table where equal blocks share a line."""

    @property
    def swapped(self) -> list[BlockReport]:
        return [block for block in self if block.action == "swapped"]

    @property
    def left(self) -> list[BlockReport]:
        return [block for block in self if block.action == "left"]

    def __repr__(self) -> str:
        lines: dict[tuple[str, ...], int] = {}
        for block in self:
            kept = f"{block.before:,.0f} -> {block.after:,.0f}" if block.what else ""
            path = re.sub(r"(?<![^.])\d+(?![^.])", "*", block.path) or "(the model)"
            line = (path, block.kind, block.action, block.what or block.reason, kept)
            lines[line] = lines.get(line, 0) + 1
        head = ("block", "class", "", "computes, or reason", "bytes per token", "count")
        rows = [head, *((*line, str(count)) for line, count in lines.items())]
        before, after = (sum(getattr(b, name) for b in self.swapped) for name in ("before", "after"))
        total = f"{len(self.swapped)} of {len(self)} blocks swapped"
        if before:
            total += f"; they save {after:,.0f} bytes per token for backward instead of {before:,.0f}"
        return "\n".join([*columns(rows, left=len(head)), total])


def describe(plan: Plan) -> str:
    """Return in a few words what a block computes."""
    words = [plan.inner.activation]
    if plan.inner.packing:
        words.append(plan.inner.packing.replace("_", " "))
    if plan.inner.dropout:
        words.append("dropout")
    return ", ".join(words)
