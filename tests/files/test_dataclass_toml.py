"""Configurations: TOML both ways, overrides, and errors that name the key and the remedy."""

from dataclasses import dataclass, field
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ffn.files.dataclass_toml import apply_overrides, flatten, from_dict, from_toml, to_toml


@dataclass(frozen=True)
class Model:
    vocab_size: int
    num_layers: int = 2
    head_dim: int | None = None
    act: Literal["relu", "swiglu"] = "relu"

    def __post_init__(self) -> None:
        if self.num_layers < 1:
            raise ValueError(f"num_layers={self.num_layers}: want 1 or more")


@dataclass(frozen=True)
class Loop:
    lr: float = 1e-3
    betas: tuple[float, ...] = (0.9, 0.95)
    name: str = "x"
    flag: bool = True


@dataclass(frozen=True)
class Whole:
    out: str = "runs"
    model: Model = field(default_factory=lambda: Model(3, head_dim=7))
    train: Loop = field(default_factory=Loop)


def test_toml_reads_as_a_person_would_write_it() -> None:
    assert to_toml(Whole(model=Model(3))) == (
        'out = "runs"\n\n[model]\nvocab_size = 3\nnum_layers = 2\nhead_dim = "none"\nact = "relu"\n\n'
        '[train]\nlr = 0.001\nbetas = [0.9, 0.95]\nname = "x"\nflag = true\n'
    )


TEXTS = st.text(st.characters(exclude_categories=["Cs"]))


@given(
    out=TEXTS,
    vocab=st.integers(-(2**63), 2**63 - 1),
    head=st.none() | st.integers(0, 9),
    lr=st.floats(allow_nan=False),
    betas=st.lists(st.floats(allow_nan=False), max_size=3).map(tuple),
    name=TEXTS,
    flag=st.booleans(),
)
def test_toml_and_back_is_the_same(out, vocab, head, lr, betas, name, flag) -> None:
    config = Whole(out, Model(vocab, head_dim=head), Loop(lr, betas, name, flag))
    assert from_toml(Whole, to_toml(config)) == config


def test_what_a_file_leaves_out_keeps_its_default_also_inside_a_table() -> None:
    config = from_toml(Whole, "[model]\nnum_layers = 5\n")
    assert config == Whole(model=Model(3, num_layers=5, head_dim=7))


@pytest.mark.parametrize(
    ("word", "key", "value"),
    [
        ("model.head_dim=none", "model.head_dim", "none"),
        ("model.head_dim=4", "model.head_dim", 4),
        ("train.lr=1", "train.lr", 1.0),
        ("train.lr=3e-4", "train.lr", 3e-4),
        ("train.betas=[1, 0.2]", "train.betas", [1.0, 0.2]),
        ("train.flag=false", "train.flag", False),
        ("train.name=a=b c", "train.name", "a=b c"),
        ("train.name=true", "train.name", "true"),
        ("out=12", "out", "12"),
        ("out=", "out", ""),
        ("model.act=swiglu", "model.act", "swiglu"),
    ],
)
def test_a_word_sets_one_key_and_no_other(word: str, key: str, value: object) -> None:
    before, after = flatten(Whole()), flatten(apply_overrides(Whole(), [word]))
    assert after.pop(key) == value
    assert type(after) is dict
    del before[key]
    assert after == before


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("train.lr_rate=1", r"^train.lr_rate: no such key; did you mean train.lr\?$"),
        ("model.n_layer=2", r"^model.n_layer: no such key; did you mean model.num_layers\?$"),
        ("lr=2", r"^lr: no such key; did you mean train.lr\?$"),
        ("lr_rate=2", r"^lr_rate: no such key; did you mean train.lr\?$"),
        ("num_layer=2", r"^num_layer: no such key; did you mean model.num_layers\?$"),
        ("trian.lr=2", r"^trian: no such key; did you mean train\?$"),
        ("zzz=1", r"^zzz: no such key; there are out, model, train$"),
        ("train.zzz=1", r"^train.zzz: no such key; there are lr, betas, name, flag$"),
        ("train.flag=3", r"^train.flag: wants true or false; got 3$"),
        ("train.lr=fast", r"^train.lr: wants a number; got 'fast'$"),
        ("train.lr=true", r"^train.lr: wants a number; got True$"),
        ("train.betas=1", r"^train.betas: wants a list; got 1$"),
        ("model.num_layers=1.5", r"^model.num_layers: wants a whole number; got 1.5$"),
        ("model.num_layers=0", "^model.num_layers=0: want 1 or more$"),
        ("model.act=swiglo", r"^model.act: wants one of relu, swiglu; got 'swiglo'; did you mean swiglu\?$"),
        ("model=2", r"^model: wants a table of keys such as model.vocab_size; got '2'$"),
        ("train", r"^train: wants key=value, as in train.steps=100$"),
    ],
)
def test_a_wrong_word_is_explained_in_one_line(word: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        apply_overrides(Whole(), [word])


def test_a_mapping_speaks_of_its_keys_by_the_given_prefix() -> None:
    with pytest.raises(ValueError, match=r"^model.vocab_size: missing, and it has no default$"):
        from_dict(Model, {}, "model")
    with pytest.raises(ValueError, match=r"^a.model.num_layers=0: want 1 or more$"):
        from_dict(Model, {"vocab_size": 1, "num_layers": 0}, "a.model")
    with pytest.raises(ValueError, match=r"^model.head_size: no such key; did you mean model.head_dim\?$"):
        from_dict(Model, {"vocab_size": 1, "head_size": 2}, "model")


def test_what_is_not_toml_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^not TOML: Invalid value"):
        from_toml(Whole, "out = ")


@dataclass(frozen=True)
class Named:
    names: tuple[str, ...] = ()


def test_a_list_of_strings_is_a_word_too() -> None:
    assert apply_overrides(Named(), ['names=["a", "b c"]']) == Named(("a", "b c"))
    assert from_toml(Named, to_toml(Named(("x",)))) == Named(("x",))
    with pytest.raises(ValueError, match=r"^names: wants a list; got 'a'$"):
        apply_overrides(Named(), ["names=a"])
