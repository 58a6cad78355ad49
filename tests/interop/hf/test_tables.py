"""Every architecture gives transformers' numbers from its weights, in float64, whole, cached and padded."""

import pytest
import torch
from torch import Tensor

from ffn.interop.hf.config import read_config, spelled_out, write_config
from ffn.interop.hf.tables import match_names, tied_names, weights
from ffn.nn.attention import LayerCache
from ffn.transformer import Transformer
from ffn.transformer_config import TransformerConfig
from tests.interop.hf.tiny import VOCAB, build_theirs, cases, decoders, in_float64, output_of

F64 = torch.float64
T = 13


def build_ours(model) -> Transformer:
    """Ours, from the oracle's own config and state dict."""
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
    return torch.randint(4, VOCAB, shape)  # above the padding tokens of all


@cases
def test_whole(name: str) -> None:
    model, tokens = build_theirs(name), tokens_of(2, T)
    near(build_ours(model)(tokens), output_of(model, tokens))


@cases
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(name: str, side: str) -> None:
    model, tokens = build_theirs(name), tokens_of(3, T)
    lengths = torch.tensor([[4], [9], [T]])
    real = torch.arange(T) < lengths if side == "right" else torch.arange(T) >= T - lengths
    tokens[~real] = model.config.pad_token_id or 0
    ours = build_ours(model)(tokens, attention_mask=real)
    # theirs counts positions from the first column, padding or not, unless told, as its generate tells it
    positions = {} if name.startswith("roberta") else {"position_ids": (real.cumsum(-1) - 1).clamp(min=0)}
    theirs = output_of(model, tokens, attention_mask=real.long(), **positions)
    near(ours[real], theirs[real])


@decoders
@pytest.mark.parametrize("padded", [False, True])
def test_step_by_step(name: str, padded: bool) -> None:
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
def test_their_steps_are_ours(name: str) -> None:
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
def test_written_back(name: str) -> None:
    """The config and the weights that we write make the same model of theirs again."""
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


def test_no_such_architecture() -> None:
    config = TransformerConfig(vocab_size=3, dim=4, num_layers=1, num_heads=1)
    for function in (weights, lambda c, a: match_names([], c, a)):
        with pytest.raises(ValueError, match="architecture='mamba': no table of weights for it; there are"):
            function(config, "mamba")
