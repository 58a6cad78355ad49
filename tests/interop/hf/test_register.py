"""Models of transformers load swapped once registered, and are theirs again afterwards."""

import pickle

import pytest
import torch

import ffn
from ffn.interop.hf import register_with_transformers, unregister_with_transformers
from ffn.interop.hf.register import BLOCKS
from ffn.interop.swap.reroute import Rerouted

transformers = pytest.importorskip("transformers")

SMALL = {"num_hidden_layers": 2, "vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
WIDE = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 52}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SMALL, **WIDE, num_key_value_heads=2),
    "gpt2": lambda: transformers.GPT2Config(**SMALL, n_embd=32, n_head=4),
    "bert": lambda: transformers.BertConfig(**SMALL, **WIDE),
    "phi3": lambda: transformers.Phi3Config(**SMALL, **WIDE, num_key_value_heads=2),
}


@pytest.fixture
def registered():
    names = register_with_transformers(CONFIGS)
    yield names
    unregister_with_transformers()


def rerouted(model) -> int:
    return sum(isinstance(module, Rerouted) for module in model.modules())


@pytest.mark.parametrize("name", CONFIGS)
def test_models_load_swapped_with_the_same_numbers(name, registered, tmp_path):
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(CONFIGS[name]()).double().eval()
    assert rerouted(model) == 2
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModel.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert rerouted(loaded) == 2
    tokens = torch.arange(1, 9)[None]
    after = loaded(tokens).last_hidden_state
    torch.testing.assert_close(after, model(tokens).last_hidden_state, rtol=0, atol=0)
    assert ffn.unswap(loaded) == 2
    torch.testing.assert_close(loaded(tokens).last_hidden_state, after, rtol=1e-10, atol=1e-10)


def test_the_classes_are_those_of_a_swap(registered):
    model = transformers.AutoModel.from_config(CONFIGS["llama"]())
    other = transformers.LlamaModel(CONFIGS["llama"]())
    ffn.swap(other)
    assert type(model.layers[0].mlp) is type(other.layers[0].mlp)
    assert rerouted(pickle.loads(pickle.dumps(model))) == 2


def test_an_activation_without_a_row_is_left_alone(registered):
    config = CONFIGS["llama"]()
    config.hidden_act = "laplace"
    assert rerouted(transformers.AutoModel.from_config(config)) == 0


def test_afterwards_models_are_theirs():
    register_with_transformers(["llama"])
    with pytest.raises(ValueError, match="LlamaMLP already have a replacement"):
        register_with_transformers(["llama"])
    unregister_with_transformers()
    assert rerouted(transformers.AutoModel.from_config(CONFIGS["llama"]())) == 0


def test_an_unknown_type_is_refused():
    with pytest.raises(ValueError, match="no nonesuch; known are bart, bert"):
        register_with_transformers(["nonesuch"])


def test_every_class_named_is_there():
    names = register_with_transformers()
    unregister_with_transformers()
    assert names == sorted({name for classes in BLOCKS.values() for name in classes})
