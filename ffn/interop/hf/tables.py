"""Map each of our parameters to a view of one of Hugging Face's tensors."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from einops import rearrange
from torch import Tensor

from ffn.gpt.config import TransformerConfig
from ffn.gpt.transformer import Transformer
from ffn.interop.hf.names import TABLES, Row, Table

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Weight:
    """The place of one of our parameters in one of their tensors.

    Args:
        name, shape: of their tensor.
        view: returns our part of their tensor as a view, with our elements in our order. It may have more
            dimensions than ours, since a view of an interleaved packing cannot join them: use `load` and
            `store`.
    """

    name: str
    shape: Shape
    view: Callable[[Tensor], Tensor]

    def load(self, ours: Tensor, theirs: Tensor) -> None:
        """Copy from their tensor into our contiguous parameter."""
        part = self.view(theirs)
        ours.view(part.shape).copy_(part)

    def store(self, theirs: Tensor, ours: Tensor) -> None:
        """Copy our parameter into its place in their tensor."""
        part = self.view(theirs)
        part.copy_(ours.reshape(part.shape))


def weights(config: TransformerConfig, architecture: str) -> dict[str, Weight]:
    """Return the place of each of our parameters, by name. Several may lie in one of their tensors.

    Args:
        architecture: their model_type, such as "llama".

    Raises:
        ValueError: the architecture is unknown, or has no place for a parameter.
    """
    table, found = _table(architecture), {}
    state = Transformer(config, device="meta").state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    for ours, shape in shapes.items():
        pattern, layer, kind = _split(ours)
        if pattern not in table.rows:
            raise ValueError(f"{architecture}: no place for the parameter {ours}")
        row = table.rows[pattern]
        theirs = row.tied_bias if row.tied_bias and kind == "bias" and config.tie_embeddings else ""
        theirs = (theirs or f"{row.name}.{kind}").replace("*", layer)
        if config.head == "none":  # a base model's file has no prefix
            theirs = theirs.removeprefix(table.prefix)
        members = [shapes[_join(member, layer, kind)] for member in row.members]
        whole, view = _place(row, shape, members, config, kind)
        found[ours] = Weight(theirs, whole, view)
    return found


def match_names(names: Iterable[str], config: TransformerConfig, architecture: str) -> dict[str, str]:
    """Return the names in a file -> the names of `weights`, without tensors that our models do not need.

    Left out are masks and tables that follow from the config, heads that we do not have, and the copy of a
    tied tensor that is stored twice (see `tied_names`). A base model's names may have their prefix or not.
    Unknown names stay as they are.
    """
    names, table = list(names), _table(architecture)
    wanted = {row.name for row in weights(config, architecture).values()}
    full = {name: _prefixed(name, wanted, table) for name in names}
    there, copies = set(full.values()), _copies(config, table)
    matched = {}
    for name, theirs in full.items():
        source = copies.get(theirs)
        if theirs in wanted:
            matched[name] = theirs
        elif source is not None and source not in there:
            matched[name] = source
        elif source is None and not table.ignored.search(theirs):
            matched[name] = theirs
    return matched


def tied_names(names: Iterable[str], config: TransformerConfig, architecture: str) -> dict[str, str]:
    """Return the names in a file of copies of tied tensors -> the names in the file of their sources.

    If the two tensors differ, the weights are not tied, whatever the config says.
    """
    table = _table(architecture)
    wanted = {row.name for row in weights(config, architecture).values()}
    full = {_prefixed(name, wanted, table): name for name in names}
    copies = _copies(config, table)
    return {full[copy]: full[source] for copy, source in copies.items() if copy in full and source in full}


def _table(architecture: str) -> Table:
    if architecture not in TABLES:
        raise ValueError(f"architecture must be one of {', '.join(TABLES)}, got {architecture!r}")
    return TABLES[architecture]


def _split(ours: str) -> tuple[str, str, str]:
    """Split blocks.3.attention.q_proj.weight into blocks.*.attention.q_proj, 3 and weight."""
    stem, _, kind = ours.rpartition(".")
    if not stem.startswith("blocks."):
        return stem, "", kind
    _, layer, rest = stem.split(".", 2)
    return f"blocks.*.{rest}", layer, kind


def _join(pattern: str, layer: str, kind: str) -> str:
    return f"{pattern.replace('*', layer)}.{kind}"


def _prefixed(name: str, wanted: set[str], table: Table) -> str:
    """Return the name as in `weights`, whether given with the prefix or without."""
    for old, new in table.old_endings.items():
        name = name.removesuffix(old) + new if name.endswith(old) else name
    other = name.removeprefix(table.prefix) if name.startswith(table.prefix) else table.prefix + name
    return other if name not in wanted and other in wanted else name


def _copies(config: TransformerConfig, table: Table) -> dict[str, str]:
    """Return further names of a tied head's tensors -> the names in `weights`."""
    return dict(table.tied) if config.tie_embeddings and config.head != "none" else {}


def _place(row: Row, ours: Shape, members: list[Shape], c: TransformerConfig, kind: str) -> tuple:
    """Return the shape of their tensor and the function that views our part of it."""
    if row.packing == "heads":  # queries, keys and values of each head together: (Q, 3, C, ...)
        heads, index = c.num_heads, row.index
        whole = (3 * ours[0], *ours[1:])
        return whole, partial(_of_heads, heads=heads, index=index)
    start = sum(shape[0] for shape in members[: row.index])
    whole = (sum(shape[0] for shape in members), *ours[1:]) if members else ours
    if row.transposed and kind == "weight":
        return whole[::-1], partial(_of_columns, start=start, length=ours[0])
    return whole, partial(_of_rows, start=start, length=ours[0])


def _of_rows(theirs: Tensor, start: int, length: int) -> Tensor:
    return theirs.narrow(0, start, length)


def _of_columns(theirs: Tensor, start: int, length: int) -> Tensor:
    return theirs.narrow(1, start, length).t()


def _of_heads(theirs: Tensor, heads: int, index: int) -> Tensor:
    return rearrange(theirs, "(head three c) ... -> three head c ...", head=heads, three=3)[index]
