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
            raise ValueError(f"num_layers must be 1 or more, got {self.num_layers}")


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


def test_to_toml_writes_plain_toml() -> None:
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
def test_toml_round_trip(out, vocab, head, lr, betas, name, flag) -> None:
    config = Whole(out, Model(vocab, head_dim=head), Loop(lr, betas, name, flag))
    assert from_toml(Whole, to_toml(config)) == config


def test_absent_keys_keep_their_defaults_inside_a_table_too() -> None:
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
        ("model={num_layers = 4}", "model.num_layers", 4),
    ],
)
def test_a_word_sets_one_key(word: str, key: str, value: object) -> None:
    before, after = flatten(Whole()), flatten(apply_overrides(Whole(), [word]))
    assert after.pop(key) == value
    assert type(after) is dict
    del before[key]
    assert after == before


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("train.lr_rate=1", r"^train.lr_rate is not a key; .* train.lr\?$"),
        ("model.n_layer=2", r"^model.n_layer is not a key; .* model.num_layers\?$"),
        ("lr=2", r"^lr is not a key; .* train.lr\?$"),
        ("lr_rate=2", r"^lr_rate is not a key; .* train.lr\?$"),
        ("num_layer=2", r"^num_layer is not a key; .* model.num_layers\?$"),
        ("trian.lr=2", r"^trian is not a key; .* train\?$"),
        ("zzz=1", r"^zzz is not a key; .* out, model, train$"),
        ("train.zzz=1", r"^train.zzz is not a key; .* lr, betas, name, flag$"),
        ("train.flag=3", r"^train.flag must be true or false, got 3$"),
        ("train.lr=fast", r"^train.lr must be a number, got 'fast'$"),
        ("train.lr=true", r"^train.lr must be a number, got True$"),
        ("train.betas=1", r"^train.betas must be a list, got 1$"),
        ("model.num_layers=1.5", r"^model.num_layers must be an integer, got 1.5$"),
        ("model.num_layers=0", "^model.num_layers must be 1 or more, got 0$"),
        ("model.act=swiglo", r"^model.act must be one of relu, swiglu, got 'swiglo'; .* swiglu\?$"),
        ("model=2", r"^model must be a table .* model.vocab_size, got 2$"),
        ("model=two", r"^model must be a table .* got 'two'$"),
        ("num_layers.x=2", r"^num_layers is not a key; .* model.num_layers\?$"),
        ("train", r"^train must be key=value"),
    ],
)
def test_a_wrong_word_is_refused_by_key(word: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        apply_overrides(Whole(), [word])


def test_from_dict_names_keys_with_the_prefix() -> None:
    with pytest.raises(ValueError, match=r"^model.vocab_size is missing"):
        from_dict(Model, {}, "model")
    with pytest.raises(ValueError, match=r"^a.model.num_layers must be 1 or more, got 0$"):
        from_dict(Model, {"vocab_size": 1, "num_layers": 0}, "a.model")
    with pytest.raises(ValueError, match=r"^model.head_size is not a key; .* model.head_dim\?$"):
        from_dict(Model, {"vocab_size": 1, "head_size": 2}, "model")


def test_invalid_toml_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^not TOML"):
        from_toml(Whole, "out = ")


@dataclass(frozen=True)
class Named:
    names: tuple[str, ...] = ()


def test_a_word_sets_a_list_of_strings() -> None:
    assert apply_overrides(Named(), ['names=["a", "b c"]']) == Named(("a", "b c"))
    assert from_toml(Named, to_toml(Named(("x",)))) == Named(("x",))
    with pytest.raises(ValueError, match=r"^names must be a list"):
        apply_overrides(Named(), ["names=a"])


@dataclass(frozen=True)
class Nest:
    module: str = "x"
    whole: Whole = field(default_factory=Whole)


def test_a_dotted_key_without_its_table_is_suggested_whole() -> None:
    with pytest.raises(ValueError, match=r"^model is not a key; did you mean whole.model.act\?$"):
        apply_overrides(Nest(), ["model.act=relu"])
