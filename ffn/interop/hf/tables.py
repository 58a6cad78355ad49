"""Whose weight is whose: our parameters by name, each as a view of one of Hugging Face's tensors."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor

from ffn.transformer import Transformer, TransformerConfig


@dataclass(frozen=True)
class Weight:
    """One of our parameters, within one of theirs.

    name, shape: of their tensor.
    view: the part of their tensor that is ours, as a view, with our elements in our order. Its dimensions may
        be split finer than ours, since a view of an interleaved packing cannot join them: use `load` and
        `store`.
    """

    name: str
    shape: tuple[int, ...]
    view: Callable[[Tensor], Tensor]

    def load(self, ours: Tensor, theirs: Tensor) -> None:
        """Copy from their tensor into our parameter, which is contiguous."""
        part = self.view(theirs)
        ours.view(part.shape).copy_(part)

    def store(self, theirs: Tensor, ours: Tensor) -> None:
        """Copy our parameter into its place in their tensor."""
        part = self.view(theirs)
        part.copy_(ours.reshape(part.shape))


def _whole(theirs: Tensor) -> Tensor:
    return theirs


LLAMA = {
    "embedding.token": "model.embed_tokens",
    "blocks.*.attention_norm": "model.layers.*.input_layernorm",
    "blocks.*.attention.q_proj": "model.layers.*.self_attn.q_proj",
    "blocks.*.attention.k_proj": "model.layers.*.self_attn.k_proj",
    "blocks.*.attention.v_proj": "model.layers.*.self_attn.v_proj",
    "blocks.*.attention.o_proj": "model.layers.*.self_attn.o_proj",
    "blocks.*.feed_forward_norm": "model.layers.*.post_attention_layernorm",
    "blocks.*.feed_forward.gate_proj": "model.layers.*.mlp.gate_proj",
    "blocks.*.feed_forward.up_proj": "model.layers.*.mlp.up_proj",
    "blocks.*.feed_forward.down_proj": "model.layers.*.mlp.down_proj",
    "norm": "model.norm",
    "head": "lm_head",
}
TABLES = {"llama": LLAMA}


def weights(config: TransformerConfig, architecture: str) -> dict[str, Weight]:
    """Our parameter's name -> its place in their tensors; several of ours may lie in one of theirs.

    Args:
        architecture: their model_type, as "llama".

    Raises:
        ValueError: no such architecture.
    """
    if architecture not in TABLES:
        known = ", ".join(TABLES)
        raise ValueError(f"architecture={architecture!r}: no table of weights for it; there are {known}")
    table, rows = TABLES[architecture], {}
    for ours, tensor in Transformer(config, device="meta").state_dict().items():
        stem, _, kind = ours.rpartition(".")
        layer = stem.split(".")[1] if stem.startswith("blocks.") else ""
        pattern = stem.replace(f"blocks.{layer}.", "blocks.*.", 1) if layer else stem
        theirs = table[pattern].replace("*", layer)
        rows[ours] = Weight(f"{theirs}.{kind}", tuple(tensor.shape), _whole)
    return rows


def match_names(names: Iterable[str], config: TransformerConfig, architecture: str) -> dict[str, str]:
    """A file's names -> those of `weights`; those that say nothing (buffers, tied copies) are left out.

    A base model's names come with and without the prefix ("model."); what nobody knows stays as it is.
    """
    wanted = {row.name for row in weights(config, architecture).values()}
    matched = {}
    for name in names:
        if name.endswith(".rotary_emb.inv_freq") or (config.tie_embeddings and name == "lm_head.weight"):
            continue
        other = name.removeprefix("model.") if name.startswith("model.") else f"model.{name}"
        matched[name] = other if name not in wanted and other in wanted else name
    return matched
