"""Every architecture gives the outputs of transformers in float64: whole, cached and padded."""

import dataclasses

import pytest
import torch
from torch import Tensor

from ffn.gpt.config import TransformerConfig
from ffn.gpt.transformer import Transformer
from ffn.interop.hf.config import read_config, spelled_out, write_config
from ffn.interop.hf.tables import match_names, tied_names, weights
from ffn.nn.attention import LayerCache
from tests.interop.hf.tiny import VOCAB, build_theirs, cases, decoders, in_float64, output_of

F64 = torch.float64
T = 13


def build_ours(model) -> Transformer:
    """Build our model from the config and state dict of the oracle."""
    keys = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    config, architecture = read_config(keys), model.config.model_type
    ours, theirs = Transformer(config, dtype=F64).eval(), model.state_dict()
    names = {wanted: name for name, wanted in match_names(theirs, config, architecture).items()}
    rows = weights(config, architecture)
    assert {row.name for row in rows.values()} == set(names)
    assert rows.keys() == ours.state_dict().keys()
    with torch.no_grad():
        for name, parameter in ours.state_dict().items():
            parameter.fill_(torch.nan)
            tensor = theirs[names[rows[name].name]]
            assert tuple(tensor.shape) == rows[name].shape
            rows[name].load(parameter, tensor)
    return ours


def near(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def tokens_of(*shape: int) -> Tensor:
    return torch.randint(4, VOCAB, shape)  # above every model's padding token


@cases
def test_outputs_equal_theirs(name: str) -> None:
    model, tokens = build_theirs(name), tokens_of(2, T)
    near(build_ours(model)(tokens), output_of(model, tokens))


@cases
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_outputs_equal_theirs(name: str, side: str) -> None:
    model, tokens = build_theirs(name), tokens_of(3, T)
    lengths = torch.tensor([[4], [9], [T]])
    real = torch.arange(T) < lengths if side == "right" else torch.arange(T) >= T - lengths
    tokens[~real] = model.config.pad_token_id or 0
    ours = build_ours(model)(tokens, attention_mask=real)
    # theirs counts padding in positions unless they are given, as its generate does
    positions = {} if name.startswith("roberta") else {"position_ids": (real.cumsum(-1) - 1).clamp(min=0)}
    theirs = output_of(model, tokens, attention_mask=real.long(), **positions)
    near(ours[real], theirs[real])


@pytest.mark.parametrize("name", ["roberta", "roberta-bare"])
def test_roberta_positions_skip_padding_without_a_mask(name: str) -> None:
    model, tokens = build_theirs(name), tokens_of(2, T)
    tokens[0, 3:5] = tokens[1, 0] = tokens[1, -2:] = model.config.pad_token_id
    near(build_ours(model)(tokens), output_of(model, tokens))


@pytest.mark.parametrize("name", ["bert", "bert-bare", "roberta"])
def test_outputs_with_token_types_equal_theirs(name: str) -> None:
    model, tokens = build_theirs(name), tokens_of(2, T)
    types = torch.randint(3, (2, T))
    near(build_ours(model)(tokens, token_types=types), output_of(model, tokens, token_type_ids=types))


@decoders
@pytest.mark.parametrize("padded", [False, True])
def test_cached_outputs_equal_theirs(name: str, padded: bool) -> None:
    model, tokens = build_theirs(name), tokens_of(2, T)
    ours = build_ours(model)
    real = torch.ones(2, T, dtype=torch.bool)
    real[0, :3] = not padded
    whole = output_of(
        model, tokens, attention_mask=real.long(), position_ids=(real.cumsum(-1) - 1).clamp(min=0)
    )
    cache, start = [LayerCache(T) for _ in ours.blocks], 0
    for end in (5, *range(6, T + 1)):
        seen = real[:, :end] if padded else None
        with torch.no_grad():
            out = ours(tokens[:, start:end], cache=cache, attention_mask=seen)
        shown = real[:, start:end]
        near(out[shown], whole[:, start:end][shown])
        start = end


@decoders
def test_their_cached_outputs_equal_ours(name: str) -> None:
    model, tokens = build_theirs(name), tokens_of(1, T)
    ours = build_ours(model)
    steps, past = [], None
    with in_float64(model), torch.no_grad():
        for i in range(T):
            out = model(tokens[:, i : i + 1], past_key_values=past, use_cache=True)
            past = out.past_key_values
            steps.append(out.logits if "logits" in out else out.last_hidden_state)
        near(ours(tokens), torch.cat(steps, 1))


@cases
def test_written_config_and_weights_give_their_model_again(name: str) -> None:
    """The config and the weights that we write give the same model in transformers."""
    model, tokens = build_theirs(name), tokens_of(2, T)
    ours, architecture = build_ours(model), model.config.model_type
    keys = write_config(ours.config, architecture)
    assert spelled_out(read_config(keys)) == spelled_out(ours.config)
    config = type(model.config).from_dict(keys)
    config._attn_implementation = model.config._attn_implementation
    again = type(model)(config).double().eval()
    state = {}
    for our_name, row in weights(ours.config, architecture).items():
        tensor = state.setdefault(row.name, torch.full(row.shape, torch.nan, dtype=F64))
        row.store(tensor, ours.state_dict()[our_name])
    assert not any(tensor.isnan().any() for tensor in state.values())
    missing, unexpected = again.load_state_dict(state, strict=False)
    again.tie_weights()
    copies = tied_names([*state, *missing], ours.config, architecture)
    assert not unexpected
    assert not {n for n in match_names(missing, ours.config, architecture) if n not in copies}
    near(output_of(again, tokens), output_of(model, tokens))


def test_an_unknown_architecture_is_refused() -> None:
    config = TransformerConfig(vocab_size=3, dim=4, num_layers=1, num_heads=1)
    for function in (weights, lambda c, a: match_names([], c, a)):
        with pytest.raises(ValueError, match=r"^architecture\b.*mamba"):
            function(config, "mamba")


def config_of(model_type: str, head: str, **options) -> TransformerConfig:
    sizes = {"gpt2": ("n_embd", "n_layer", "n_head"), "distilbert": ("dim", "n_layers", "n_heads")}
    usual = ("hidden_size", "num_hidden_layers", "num_attention_heads")
    keys = dict(zip(sizes.get(model_type, usual), (8, 1, 2), strict=True))
    keys |= {"rotary_pct": 0.5} if model_type == "gpt_neox" else {}
    config = read_config({"model_type": model_type, "vocab_size": 11, **keys, **options})
    return dataclasses.replace(config, head=head)


@pytest.mark.parametrize(
    ("model_type", "head", "theirs", "wanted"),
    [
        ("gpt2", "logits", "h.0.ln_1.weight", "transformer.h.0.ln_1.weight"),
        ("gpt2", "none", "transformer.wte.weight", "wte.weight"),
        ("gpt2", "none", "wte.weight", "wte.weight"),
        ("gpt2", "logits", "lm_head.weight", "transformer.wte.weight"),  # tied, saved under its other name
        ("gpt2", "logits", "h.0.attn.bias", None),
        ("gpt2", "logits", "transformer.h.0.attn.masked_bias", None),
        ("gpt2", "logits", "transformer.h.0.attn.c_attn.bias", "transformer.h.0.attn.c_attn.bias"),
        ("gpt_neox", "logits", "embed_out.weight", "lm_head.weight"),
        ("gpt_neox", "logits", "gpt_neox.layers.0.attention.rotary_emb.inv_freq", None),
        ("gpt_neox", "logits", "gpt_neox.layers.0.attention.bias", None),
        ("bert", "mlm", "bert.embeddings.LayerNorm.gamma", "bert.embeddings.LayerNorm.weight"),
        ("bert", "none", "bert.embeddings.LayerNorm.beta", "embeddings.LayerNorm.bias"),
        ("bert", "none", "embeddings.position_ids", None),
        ("bert", "mlm", "bert.pooler.dense.weight", None),
        ("bert", "none", "pooler.dense.bias", None),
        ("bert", "mlm", "cls.seq_relationship.weight", None),
        ("bert", "mlm", "cls.predictions.decoder.bias", "cls.predictions.bias"),
        ("bert", "none", "cls.predictions.transform.dense.weight", "cls.predictions.transform.dense.weight"),
        ("roberta", "mlm", "lm_head.decoder.weight", "roberta.embeddings.word_embeddings.weight"),
        ("llama", "logits", "layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("llama", "logits", "model.layers.0.self_attn.rotary_emb.inv_freq", None),
        ("llama", "logits", "model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"),
        ("llama", "logits", "lora.weight", "lora.weight"),
        ("llama", "none", "lm_head.weight", "lm_head.weight"),
    ],
)
def test_names_in_files_are_mapped(model_type: str, head: str, theirs: str, wanted: str | None) -> None:
    """A name is mapped, left out, or stays as it is."""
    matched = match_names([theirs], config_of(model_type, head), model_type)
    assert matched == ({} if wanted is None else {theirs: wanted})


def test_the_copy_of_a_tied_tensor_is_left_out() -> None:
    names = ["model.embed_tokens.weight", "lm_head.weight"]
    tied, untied = (config_of("llama", "logits", tie_word_embeddings=tied) for tied in (True, False))
    assert match_names(names, tied, "llama") == {names[0]: names[0]}
    assert tied_names(names, tied, "llama") == {names[1]: names[0]}
    assert match_names(names, untied, "llama") == dict(zip(names, names, strict=True))
    assert tied_names(names, untied, "llama") == {}
    assert tied_names(["embed_tokens.weight", "lm_head.weight"], tied, "llama") == {
        "lm_head.weight": "embed_tokens.weight"
    }


def test_an_untied_bert_has_its_bias_in_the_decoder() -> None:
    config = config_of("bert", "mlm", tie_word_embeddings=False)
    rows = weights(config, "bert")
    assert rows["head.bias"].name == "cls.predictions.decoder.bias"
    assert match_names(["cls.predictions.bias"], config, "bert") == {}


def test_a_parameter_without_a_place_is_refused() -> None:
    config = dataclasses.replace(config_of("llama", "logits"), qk_norm=True)
    with pytest.raises(ValueError, match=r"llama: .*blocks\.0\.attention\.q_norm"):
        weights(config, "llama")
