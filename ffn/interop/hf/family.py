"""What one architecture's config.json says, and what is meant where it says nothing."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ffn.interop.hf.keys import Part


@dataclass(frozen=True)
class Family:
    """One model_type.

    classes: our head -> their class; the first is meant where none is named. other_classes: further classes
        that are read -> our head.
    defaults: the keys that say something -> what they are where absent.
    nullable: those of them that may be null though their default is not.
    fields: our field -> the key that says the same.
    parts: what takes more than that.
    constants: our fields that are always so.
    only: keys that are read with these values alone.
    synonyms: other names of keys.
    divides: whether hidden_size has to be a multiple of the number of heads, even with a head_dim.
    """

    classes: Mapping[str, str]
    defaults: Mapping[str, Any]
    fields: Mapping[str, str]
    parts: tuple[Part, ...]
    constants: Mapping[str, Any] = field(default_factory=dict)
    only: Mapping[str, tuple] = field(default_factory=dict)
    synonyms: Mapping[str, str] = field(default_factory=dict)
    other_classes: Mapping[str, str] = field(default_factory=dict)
    nullable: frozenset[str] = frozenset({"num_key_value_heads", "head_dim", "sliding_window"})
    divides: bool = False

    @property
    def sequence_class(self) -> str:
        """Their class that gives scores of a text; what stands on its hidden states is `classifier`'s."""
        return self.classes["none"].removesuffix("Model") + "ForSequenceClassification"
