"""The weights: tying, initialization, names, and loading into a model on the meta device."""

import copy
import dataclasses
import math
import pickle

import pytest
import torch

from ffn.gpt.transformer import Transformer
from ffn.nn.init import INITS
from tests.models import F64, SMALL, VARIANTS, build, tokens_of, variants


def test_tied_embeddings_share_one_weight() -> None:
    tied, untied = build(), build(tie_embeddings=False)
    assert "head.weight" not in tied.state_dict()
    assert untied.state_dict()["head.weight"].shape == (13, 16)
    assert untied.num_parameters() - tied.num_parameters() == 13 * 16
    before = tied(tokens_of(1, 3))
    with torch.no_grad():
        tied.embedding.weight.mul_(2.0)
    for model in (tied, copy.deepcopy(tied), pickle.loads(pickle.dumps(tied)), tied.to(torch.float32)):
        hidden = torch.randn(1, 16, dtype=model.embedding.weight.dtype)
        assert torch.equal(model.logits(hidden), hidden @ model.embedding.weight.T)
    assert before.shape == (1, 3, 13)


@variants
def test_a_meta_model_loads_a_state_dict(options: dict) -> None:
    model, tokens = build(**options), tokens_of(2, 6)
    for assign in (False, True):
        empty = Transformer(model.config, device="meta", dtype=F64)
        assert all(p.is_meta for p in empty.parameters())
        if not assign:
            empty.to_empty(device="cpu")
        empty.load_state_dict(model.state_dict(), assign=assign)
        assert torch.equal(empty(tokens), model(tokens))


def test_a_meta_model_runs_forward() -> None:
    model = Transformer(SMALL, device="meta")
    assert model(tokens_of(2, 5).to("meta")).shape == (2, 5, 13)


@pytest.mark.parametrize("init", INITS)
def test_init_weights_draws_by_the_generator_and_config(init: str) -> None:
    config = dataclasses.replace(SMALL, dim=128, hidden_dim=256, num_layers=2, init=init, vocab_size=999)
    model = Transformer(config)
    copies = []
    for seed in (3, 3, 4):
        model.init_weights(torch.Generator().manual_seed(seed))
        copies.append({name: p.clone() for name, p in model.state_dict().items()})
    assert all(torch.equal(copies[0][name], copies[1][name]) for name in copies[0])
    drawn = [name for name in copies[0] if copies[0][name].std() > 0]
    assert not any(torch.equal(copies[0][name], copies[2][name]) for name in drawn)
    last = model.blocks[1]
    out = [last.attention.o_proj.weight, last.feed_forward.down_proj.weight]
    expected = {"gpt2": 0.02 / 2.0, "depth_scaled": 0.02 / 2.0, "zero_out": 0.0}
    if init in expected:
        for weight in out:
            assert weight.std().item() == pytest.approx(expected[init], rel=0.15)
    assert model.embedding.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert (model.norm.weight == 1).all()


def test_init_weights_does_not_use_the_global_generator() -> None:
    model, state = build(torch.float32), torch.get_rng_state()
    model.init_weights(torch.Generator().manual_seed(1))
    assert torch.equal(torch.get_rng_state(), state)


def test_zero_out_blocks_start_as_the_identity() -> None:
    model = Transformer(dataclasses.replace(SMALL, init="zero_out", qk_norm=True), dtype=F64)
    tokens = tokens_of(2, 5)
    torch.testing.assert_close(model(tokens), model.logits(model.norm(model.embedding(tokens))))
    loss = model.loss(tokens, tokens_of(2, 5)).item()
    assert loss == pytest.approx(math.log(13), abs=0.2)


def test_state_dict_round_trip_and_names() -> None:
    model = build(**VARIANTS["llama"])
    names = list(model.state_dict())
    assert names[0] == "embedding.token.weight"
    assert "blocks.1.attention.k_proj.weight" in names
    assert "blocks.0.feed_forward.gate_proj.weight" in names
    assert names[-1] == "norm.weight"
    other = Transformer(model.config, dtype=F64)
    other.load_state_dict(model.state_dict())
    tokens = tokens_of(1, 4)
    assert torch.equal(other(tokens), model(tokens))
