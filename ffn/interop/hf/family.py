"""Family: the keys of one architecture's config.json and their defaults."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ffn.interop.hf.keys import KeyPair


@dataclass(frozen=True)
class Family:
    """One model_type.

    Args:
        classes: our head -> their class. The first is the default where config.json names no class.
        defaults: their key -> its value where absent.
        fields: our field -> the key with the same value.
        parts: readers and writers of everything that takes more than one key.
        constants: our fields that have one value in this architecture.
        only: their key -> the only values that are accepted.
        synonyms: another name of a key -> the key.
        other_classes: further classes that are read -> our head.
        nullable: keys that may be null although their default is not.
        divides: True if hidden_size has to be a multiple of the number of heads, even with a head_dim.
    """

    classes: Mapping[str, str]
    defaults: Mapping[str, Any]
    fields: Mapping[str, str]
    parts: tuple[KeyPair, ...]
    constants: Mapping[str, Any] = field(default_factory=dict)
    only: Mapping[str, tuple] = field(default_factory=dict)
    synonyms: Mapping[str, str] = field(default_factory=dict)
    other_classes: Mapping[str, str] = field(default_factory=dict)
    nullable: frozenset[str] = frozenset({"num_key_value_heads", "head_dim", "sliding_window"})
    divides: bool = False

    @property
    def sequence_class(self) -> str:
        """Their class for sequence classification; `ffn.interop.hf.classifier` reads its head."""
        return self.classes["none"].removesuffix("Model") + "ForSequenceClassification"
