"""A Hugging Face folder loads and saves with the same outputs; a bad folder is refused in one line."""

import dataclasses
import json
import shutil
from contextlib import suppress
from functools import partialmethod
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ffn.gpt.config import RotaryConfig
from ffn.gpt.transformer import Transformer, TransformerConfig
from ffn.interop.hf.folder import fitting_architecture, load_folder, save_folder
from ffn.interop.hf.tables import weights
from ffn.text.tokenizer import HFTokenizer
from tests.interop.hf import mutants

CONFIG = TransformerConfig(
    vocab_size=13, dim=8, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4, hidden_dim=12,
    max_seq_len=16, norm_eps=1e-6, tie_embeddings=False,
)  # fmt: skip


def state(model: Transformer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_folder(tmp_path / "m", Transformer(CONFIG))
    return tmp_path / "m"


def load_or_line(folder: Path) -> tuple[Transformer | None, str]:
    try:
        return load_folder(folder), ""
    except ValueError as error:
        return None, str(error)


def change_weights(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Replace tensors, or remove them with None; names have _ for dots."""
    found = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        name = next((known for known in found if known.replace(".", "_") == name), name)
        if tensor is None:
            del found[name]
        else:
            found[name] = tensor
    save_file(found, folder / "model.safetensors", {"format": "pt"})


def change_config(folder: Path, **keys: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 700])
def test_a_saved_model_loads_as_it_was(dtype: torch.dtype, max_shard_bytes: int, tmp_path: Path) -> None:
    model = Transformer(CONFIG, dtype=dtype)
    save_folder(tmp_path / "m", model, max_shard_bytes=max_shard_bytes)
    assert (tmp_path / "m" / "model.safetensors.index.json").exists() == (max_shard_bytes == 700)
    drawn = torch.get_rng_state()
    loaded = load_folder(tmp_path / "m")
    assert torch.equal(torch.get_rng_state(), drawn), "loading draws no random numbers"
    assert same(state(loaded), state(model))
    assert not loaded.training
    tokens = torch.randint(13, (2, 7))
    assert torch.equal(loaded(tokens), model.eval()(tokens))
    save_folder(tmp_path / "n", loaded, max_shard_bytes=max_shard_bytes)
    first, second = ({p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in "mn")
    assert first == second, "equal weights are equal files"


def test_a_given_dtype_converts_the_weights(folder: Path) -> None:
    wanted = {name: tensor.to(torch.bfloat16) for name, tensor in state(load_folder(folder)).items()}
    assert same(state(load_folder(folder, dtype=torch.bfloat16)), wanted)


def test_training_options_do_not_change_the_files(folder: Path, tmp_path: Path) -> None:
    options = {"dropout": 0.1, "ffn_dropout": 0.1, "save": "input", "chunk_tokens": 3, "init": "zero_out"}
    model = Transformer(dataclasses.replace(CONFIG, **options))
    model.load_state_dict(load_folder(folder).state_dict())
    save_folder(tmp_path / "n", model)
    assert (tmp_path / "n" / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    assert (tmp_path / "n" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_special_tokens_round_trip(folder: Path, tmp_path: Path) -> None:
    change_config(folder, bos_token_id=3, eos_token_id=[4, 5], pad_token_id=None)
    save_folder(tmp_path / "n", load_folder(folder))
    keys = json.loads((tmp_path / "n" / "config.json").read_text())
    assert (keys["bos_token_id"], keys["eos_token_id"], keys["pad_token_id"]) == (3, [4, 5], None)


def test_transformers_loads_a_saved_folder(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = Transformer(CONFIG, dtype=torch.float64).eval()
    tokens = torch.randint(13, (2, 7))
    for name, size in (("one", 10**9), ("many", 2000)):
        save_folder(tmp_path / name, model, max_shard_bytes=size)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert theirs.dtype == torch.float64
        torch.testing.assert_close(theirs(tokens).logits, model(tokens), rtol=0, atol=1e-6)
        theirs.save_pretrained(tmp_path / "theirs")
        assert same(state(load_folder(tmp_path / "theirs")), state(model))


@pytest.mark.parametrize("before", [10**9, 2500])
@pytest.mark.parametrize("after", [10**9, 2500])
def test_an_interrupted_save_never_mixes_two_models(
    before: int, after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupt before the n-th rename or removal, for every n, and then save again."""
    old = Transformer(CONFIG)
    new = Transformer(dataclasses.replace(CONFIG, rotary=RotaryConfig(theta=500.0)))
    whole, calls = [], 1
    while len(whole) < 2:
        folder, left = tmp_path / str(calls), calls
        save_folder(folder, old, max_shard_bytes=before)

        def count(path: Path, *rest: object, real, **options: object) -> object:
            nonlocal left
            left -= not path.name.endswith(".partial") or bool(rest)
            if not left:
                raise KeyboardInterrupt
            return real(path, *rest, **options)

        with monkeypatch.context() as patch:
            for name in ("replace", "unlink"):
                patch.setattr(Path, name, partialmethod(count, real=getattr(Path, name)))
            with suppress(KeyboardInterrupt):
                save_folder(folder, new, max_shard_bytes=after)
        loaded, line = load_or_line(folder)
        if loaded is None:
            assert "No such file" in line or "neither model.safetensors nor" in line
        else:
            model = next(model for model in (old, new) if model.config.rotary == loaded.config.rotary)
            assert same(state(loaded), state(model))
            whole += [model] if model is new else []
        save_folder(folder, new, max_shard_bytes=after)
        assert same(state(load_folder(folder)), state(new))
        assert not [path for path in folder.iterdir() if path.name.endswith(".partial")]
        calls += 1


def test_a_given_tokenizer_is_written(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    save_folder(tmp_path, Transformer(CONFIG), tokenizer=HFTokenizer(words.to_str()))
    assert tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode("b a c").ids == [1, 0, 2]
    (tmp_path / "tokenizer.json").write_text("mine")
    save_folder(tmp_path, Transformer(CONFIG))
    assert (tmp_path / "tokenizer.json").read_text() == "mine", "a tokenizer that is not given stays"


def test_a_model_that_fits_no_architecture_is_refused_in_one_line(tmp_path: Path) -> None:
    assert fitting_architecture(CONFIG) == "llama"
    odd = dataclasses.replace(CONFIG, position="none", norm="layernorm", parallel=True)
    with pytest.raises(ValueError, match=r"^config\b.*position") as caught:
        save_folder(tmp_path / "m", Transformer(odd))
    assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(ValueError, match=r"^model_type\b.*nose"):
        save_folder(tmp_path / "m", Transformer(CONFIG), "nose")
    model = Transformer(CONFIG)
    model.blocks[0].feed_forward.up_proj = torch.nn.Identity()
    with pytest.raises(ValueError, match=r"^model\b.*blocks\.0\.feed_forward\.up_proj"):
        save_folder(tmp_path / "m", model)
    assert not (tmp_path / "m").exists()


WRONG_WEIGHTS = {
    "missing": ({"model_norm_weight": None}, r"model\.norm\.weight$"),
    "extra": ({"nose": torch.zeros(1)}, "'nose'$"),
    "misshapen": ({"model_norm_weight": torch.zeros(9)}, r"norm\.weight .*\(8,\).*\(9,\) float32"),
    "integers": ({"model_norm_weight": torch.zeros(8, dtype=torch.int32)}, r"norm\.weight .*\(8,\) int32"),
    "one too many": ({"norm.weight": torch.zeros(8)}, "'norm.weight'"),
    "mixed": ({"model_norm_weight": torch.zeros(8).half()}, "float16 and float32.*dtype="),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG_WEIGHTS)
def test_weights_that_do_not_match_the_config_are_refused(what: str, folder: Path) -> None:
    tensors, message = WRONG_WEIGHTS[what]
    change_weights(folder, **tensors)
    with pytest.raises(ValueError, match=message) as caught:
        load_folder(folder)
    assert str(caught.value).startswith(f"{folder}: ")
    assert len(str(caught.value).splitlines()) == 1
    if what == "mixed":
        assert load_folder(folder, dtype=torch.float32).norm.weight.eq(0).all()


def test_a_stored_tied_head_must_equal_the_embedding(folder: Path) -> None:
    change_config(folder, tie_word_embeddings=True)
    with pytest.raises(ValueError, match=r"lm_head\.weight.*model\.embed_tokens\.weight"):
        load_folder(folder)
    table = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    change_weights(folder, lm_head_weight=table.clone())
    assert load_folder(folder).config.tie_embeddings


def test_many_faults_are_one_short_line(folder: Path) -> None:
    save_file({f"x{i}" * 50: torch.zeros(1) for i in range(1000)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"; and 1013 more$") as caught:
        load_folder(folder)
    assert len(str(caught.value)) < 2000


def test_a_config_that_does_not_match_the_weights_is_refused(folder: Path) -> None:
    for keys, message in (
        ({"model_type": "nose"}, r"config\.json: model_type\b.*nose"),
        ({"hidden_size": 16}, r"config\.json: .*; and 1. more$"),
        ({"num_hidden_layers": 10**9}, r"num_hidden_layers\b.*10,000"),
        ({"num_hidden_layers": 9999}, "9999 layers.* 21 tensors"),
        ({"vocab_size": 2**62}, r"."),
    ):
        text = (folder / "config.json").read_text()
        change_config(folder, **keys)
        with pytest.raises(ValueError, match=message) as caught:
            load_folder(folder)
        assert len(str(caught.value).splitlines()) == 1
        (folder / "config.json").write_text(text)


def test_a_pickle_is_loaded_by_its_own_path_alone(folder: Path) -> None:
    wanted = state(load_folder(folder))
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"pytorch_model\.bin"):
        load_folder(folder)
    assert same(state(load_folder(folder / "pytorch_model.bin")), wanted)


def read_plainly(folder: Path, model: Transformer) -> dict[str, torch.Tensor]:
    """Read the model's tensors from the files without the code under test, except its table of names."""
    assert model.origin is not None
    there = mutants.stored(folder)
    for name in list(there):  # a base model's prefix may be there or not
        for other in (
            name.partition(".")[2],
            *(f"{prefix}.{name}" for prefix in ("model", "transformer", "bert")),
        ):
            there.setdefault(other, there[name])
    found = {name: torch.empty_like(tensor) for name, tensor in model.state_dict().items()}
    for name, row in weights(model.config, model.origin["model_type"]).items():
        row.load(found[name], there[row.name])
    return found


ORIGINALS = {
    "llama": ({}, 10**9),
    "llama in shards": ({}, 2500),
    "gpt2": ({"position": "learned", "norm": "layernorm", "activation": "gelu_tanh", "bias": True,
              "attention_bias": True, "num_kv_heads": 2, "tie_embeddings": True}, 2500),
    "gemma2": ({"norm": "rmsnorm1p", "norm_position": "sandwich", "activation": "geglu_tanh",
                "embedding_scale": 8**0.5, "attention_softcap": 50.0, "logit_softcap": 30.0,
                "sliding_window": 5, "full_attention_layers": (1,), "tie_embeddings": True}, 10**9),
}  # fmt: skip


@pytest.mark.parametrize("what", ORIGINALS)
def test_mutants_are_refused_in_one_line_or_loaded_as_stored(what: str, tmp_path: Path) -> None:
    """175 mutants per original. A mutant that loads has the original's tensors, bit for bit. The exception is
    a header with changed offsets, dtypes or names that the format cannot detect: its tensors are those of the
    header."""
    options, size = ORIGINALS[what]
    config = dataclasses.replace(CONFIG, **options)
    original = Transformer(config)
    save_folder(tmp_path / "original", original, what.split()[0], max_shard_bytes=size)
    refused = 0
    part = list(ORIGINALS).index(what)
    for seed in range(175 * part, 175 * (part + 1)):
        folder = tmp_path / "mutant"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "original", folder)
        how = f"{seed}: {mutants.mutate(folder, seed)}"
        loaded, line = load_or_line(folder)
        if loaded is None:
            refused += 1
            assert len(line.splitlines()) == 1, how
            assert line.startswith(str(folder)), how
            assert len(line) < 2000, how
            continue
        assert same(state(loaded), read_plainly(folder, loaded)), how
        if "swap" not in how and "rewrite_entry" not in how and "rewrite_names" not in how:
            assert same(state(loaded), state(original)), how
    assert refused > 100
