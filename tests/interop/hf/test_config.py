"""config.json read and written: defaults as transformers has them, both spellings, refusals by name."""

import dataclasses
import math

import pytest

from ffn.gpt.config import TransformerConfig
from ffn.gpt.cost import parameter_table
from ffn.interop.hf.config import FAMILIES, read_config, spelled_out, write_config

SIZES = {
    "vocab_size": 37, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 40, "max_position_embeddings": 64, "head_dim": 6,
}  # fmt: skip
UNGROUPED = {key: value for key, value in SIZES.items() if key not in ("num_key_value_heads", "head_dim")}
OWN_SIZES = {
    "gpt2": {"n_embd": 24, "n_layer": 2, "n_head": 4, "vocab_size": 37, "n_positions": 64},
    "distilbert": {"dim": 24, "n_layers": 2, "n_heads": 4, "vocab_size": 37},
    "gpt_neox": UNGROUPED | {"rotary_pct": 0.4},
    "bert": UNGROUPED,
    "roberta": UNGROUPED,
}


def keys_of(model_type: str, **options) -> dict:
    return {"model_type": model_type, **OWN_SIZES.get(model_type, SIZES), **options}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_an_absent_key_means_what_it_does_there(model_type: str) -> None:
    transformers = pytest.importorskip("transformers")
    for given in ({}, {"use_sliding_window": True} if model_type.startswith("qwen") else {}):
        theirs = transformers.AutoConfig.for_model(model_type, **given).to_dict()
        ours = read_config({"model_type": model_type, **given})
        assert spelled_out(ours) == spelled_out(read_config(theirs))
        assert (ours.sliding_window == 4096) == (bool(given) or model_type in ("mistral", "gemma2"))


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("head", ["logits", "mlm", "none"])
def test_written_and_read_again(model_type: str, head: str) -> None:
    config = dataclasses.replace(read_config(keys_of(model_type)), head=head)
    if head not in FAMILIES[model_type].classes:
        with pytest.raises(ValueError, match=f"head='{head}': {model_type} has .* or .*"):
            write_config(config, model_type)
        return
    written = write_config(config, model_type)
    assert spelled_out(read_config(written)) == spelled_out(config)
    assert write_config(read_config(written), model_type) == written


PUBLISHED = {  # what is in the files of well-known models, and how many parameters those have
    "gpt2": (124_439_808, {
        "model_type": "gpt2", "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"],
        "attn_pdrop": 0.1, "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256,
        "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "n_ctx": 1024, "n_embd": 768, "n_head": 12,
        "n_layer": 12, "n_positions": 1024, "resid_pdrop": 0.1, "summary_activation": None,
        "summary_first_dropout": 0.1, "summary_proj_to_labels": True, "summary_type": "cls_index",
        "summary_use_proj": True, "vocab_size": 50257,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    }),
    "Llama-3.1-8B": (8_030_261_248, {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "attention_bias": False,
        "attention_dropout": 0.0, "bos_token_id": 128000, "eos_token_id": 128001, "hidden_act": "silu",
        "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
        "max_position_embeddings": 131072, "mlp_bias": False, "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 8192, "rope_type": "llama3"},
        "rope_theta": 500000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "transformers_version": "4.43.0.dev0", "use_cache": True, "vocab_size": 128256,
    }),
    "Mistral-7B-v0.1": (7_241_732_096, {
        "model_type": "mistral", "architectures": ["MistralForCausalLM"], "hidden_act": "silu",
        "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 32768,
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False, "vocab_size": 32000,
    }),
    "Qwen2.5-0.5B": (494_032_768, {
        "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0,
        "hidden_act": "silu", "hidden_size": 896, "intermediate_size": 4864, "max_position_embeddings": 32768,
        "max_window_layers": 24, "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": True,
        "use_sliding_window": False, "vocab_size": 151936,
    }),
    "gemma-2b": (2_506_172_416, {
        "model_type": "gemma", "architectures": ["GemmaForCausalLM"], "head_dim": 256, "hidden_act": "gelu",
        "hidden_activation": None, "hidden_size": 2048, "intermediate_size": 16384,
        "max_position_embeddings": 8192, "num_attention_heads": 8, "num_hidden_layers": 18,
        "num_key_value_heads": 1, "pad_token_id": 0, "rms_norm_eps": 1e-06, "rope_scaling": None,
        "rope_theta": 10000.0, "vocab_size": 256000,
    }),
    "gemma-2-2b": (2_614_341_888, {
        "model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"], "attn_logit_softcapping": 50.0,
        "cache_implementation": "hybrid", "final_logit_softcapping": 30.0, "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 2304,
        "intermediate_size": 9216, "max_position_embeddings": 8192, "num_attention_heads": 8,
        "num_hidden_layers": 26, "num_key_value_heads": 4, "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "sliding_window": 4096, "vocab_size": 256000,
    }),
    "pythia-70m": (70_426_624, {
        "model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"], "hidden_act": "gelu",
        "hidden_size": 512, "intermediate_size": 2048, "layer_norm_eps": 1e-05, "rotary_emb_base": 10000,
        "max_position_embeddings": 2048, "num_attention_heads": 8, "num_hidden_layers": 6,
        "rotary_pct": 0.25, "tie_word_embeddings": False, "use_parallel_residual": True, "vocab_size": 50304,
    }),
    "bert-base-uncased": (108_891_648, {
        "model_type": "bert", "architectures": ["BertModel"], "attention_probs_dropout_prob": 0.1,
        "gradient_checkpointing": False, "hidden_act": "gelu", "hidden_dropout_prob": 0.1,
        "hidden_size": 768, "initializer_range": 0.02, "intermediate_size": 3072, "layer_norm_eps": 1e-12,
        "max_position_embeddings": 512, "num_attention_heads": 12, "num_hidden_layers": 12,
        "pad_token_id": 0, "position_embedding_type": "absolute", "type_vocab_size": 2, "vocab_size": 30522,
    }),
    "roberta-base": (124_055_040, {
        "model_type": "roberta", "architectures": ["RobertaModel"], "hidden_act": "gelu",
        "hidden_size": 768, "intermediate_size": 3072, "layer_norm_eps": 1e-05,
        "max_position_embeddings": 514, "num_attention_heads": 12, "num_hidden_layers": 12,
        "pad_token_id": 1, "type_vocab_size": 1, "vocab_size": 50265,
    }),
    "distilbert-base-uncased": (66_362_880, {
        "model_type": "distilbert", "architectures": ["DistilBertModel"], "activation": "gelu",
        "attention_dropout": 0.1, "dim": 768, "dropout": 0.1, "hidden_dim": 3072, "n_heads": 12,
        "n_layers": 6, "max_position_embeddings": 512, "sinusoidal_pos_embds": False, "tie_weights_": True,
        "qa_dropout": 0.1, "seq_classif_dropout": 0.2, "vocab_size": 30522, "pad_token_id": 0,
    }),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files(name: str) -> None:
    parameters, keys = PUBLISHED[name]
    assert sum(part.parameters for part in parameter_table(read_config(keys), 1)) == parameters


def test_both_spellings_of_rotary_positions() -> None:
    scaling = {"factor": 4.0, "low_freq_factor": 2.0, "high_freq_factor": 3.0}
    scaling |= {"original_max_position_embeddings": 16}
    old = {"rope_theta": 77, "rope_scaling": scaling | {"type": "llama3"}}
    new = {"rope_parameters": scaling | {"rope_type": "llama3", "rope_theta": 77.0}}
    config = read_config(keys_of("llama", **new))
    assert config == read_config(keys_of("llama", **old))
    assert (config.rope_base, config.rope_type, config.rope_scaling) == (77.0, "llama3", 4.0)
    assert (config.rope_original_seq_len, config.rope_low_freq_factor) == (16, 2.0)


def test_yarn_says_its_factors_in_several_ways() -> None:
    yarn = {"rope_type": "yarn", "original_max_position_embeddings": 16}
    for more, factor, amplitude in (
        ({"factor": 8.0}, 8.0, 0.1 * math.log(8) + 1),
        ({}, 4.0, 0.1 * math.log(4) + 1),  # 64 / 16
        ({"factor": 0.5}, 0.5, 1.0),
        ({"factor": 8.0, "attention_factor": 1.5}, 8.0, 1.5),
        ({"factor": 8.0, "mscale": 2.0, "mscale_all_dim": 0.5}, 8.0,
         (0.2 * math.log(8) + 1) / (0.05 * math.log(8) + 1)),
        ({"factor": 8.0, "mscale": 2.0}, 8.0, 0.1 * math.log(8) + 1),
    ):  # fmt: skip
        config = read_config(keys_of("llama", rope_parameters=yarn | more))
        assert config.rope_scaling == factor
        assert config.rotary_scaling.amplitude == pytest.approx(amplitude)


def test_which_layers_have_the_window() -> None:
    on = {"use_sliding_window": True, "sliding_window": 8, "num_hidden_layers": 3}
    assert read_config(keys_of("qwen2", sliding_window=8)).sliding_window is None
    config = read_config(keys_of("qwen2", **on, max_window_layers=1))
    assert (config.sliding_window, config.full_attention_layers) == (8, (0,))
    types = ["sliding_attention", "full_attention", "full_attention"]
    config = read_config(keys_of("qwen3", **on, layer_types=types))
    assert config.full_attention_layers == (1, 2)
    assert read_config(keys_of("mistral")).sliding_window == 4096
    assert read_config(keys_of("mistral", sliding_window=None)).sliding_window is None
    assert read_config(keys_of("gemma2", num_hidden_layers=3)).full_attention_layers == (1,)
    smol = keys_of("smollm3", **(on | {"num_hidden_layers": 5}))
    config = read_config(smol)
    assert (config.no_rope_layers, config.full_attention_layers) == ((3,), (0, 1, 2, 4))


def test_synonyms() -> None:
    config = read_config(keys_of("gpt2"))
    other = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 37}
    assert read_config({"model_type": "gpt2", **other, "max_position_embeddings": 64}) == config


UNSUPPORTED = [
    ("mamba", {}, "model_type='mamba': no such architecture here; ffn reads llama, mistral"),
    (None, {}, "model_type=None: no such architecture"),
    ("llama", {"architectures": ["LlamaForTokenClassification"]},
     "architectures=.*: no such model here; want one of LlamaForCausalLM, LlamaModel"),
    ("llama", {"architectures": ["LlamaModel", "LlamaForCausalLM"]}, "architectures=.*: no such model"),
    ("llama", {"architectures": [{}]}, "architectures=.*: no such model"),
    ("llama", {"hidden_act": "gelu_10"}, "hidden_act='gelu_10': no such activation here; there are silu"),
    ("llama", {"hidden_act": 3}, "hidden_act=3: want a name"),
    ("llama", {"hidden_size": "24"}, "hidden_size='24': want a whole number"),
    ("llama", {"hidden_size": 24.0}, "hidden_size=24.0: want a whole number"),
    ("llama", {"hidden_size": True}, "hidden_size=True: want a whole number"),
    ("llama", {"hidden_size": None}, "hidden_size=None: want a whole number"),
    ("llama", {"hidden_size": -4}, "hidden_size=-4: want a number, 0 or more"),
    ("llama", {"hidden_size": 10**400}, "hidden_size=10.*: want a number"),
    ("llama", {"hidden_size": 0}, "dim=0: want a positive whole number"),
    ("llama", {"rms_norm_eps": math.nan}, "rms_norm_eps=nan: want a number"),
    ("llama", {"rms_norm_eps": math.inf}, "rms_norm_eps=inf: want a number"),
    ("llama", {"attention_bias": "no"}, "attention_bias='no': want true or false"),
    ("llama", {"head_dim": "6"}, "head_dim: wants a whole number; got '6'"),
    ("llama", {"num_key_value_heads": 3}, "num_heads"),
    ("llama", {"residual_multiplier": 0.2}, "residual_multiplier=0.2: unknown key; if it changes no numbers"),
    ("llama", {"quantization_config": {"bits": 4}}, "quantization_config=.*: unknown key"),
    ("llama", {"is_encoder_decoder": True}, "is_encoder_decoder=True: not supported; want False"),
    ("llama", {"pruned_heads": {"0": [1]}}, "pruned_heads=.*: not supported; want {}"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5: this architecture turns all"),
    ("llama", {"rope_theta": "big"}, "rope_base: wants a number; got 'big'"),
    ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
     "rope_scaling.rope_type='dynamic': not supported; ffn reads default, linear, llama3, yarn here"),
    ("mistral", {"sliding_window": 8, "layer_types": ["full_attention"] * 2},
     "layer_types=.*: with sliding_window=8 here all layers are sliding_attention"),
    ("mistral", {"sliding_window": "8"}, "sliding_window='8': want a whole number"),
    ("qwen2", {"layer_types": ["sliding_attention"] * 2}, "layer_types=.*: with sliding_window"),
    ("qwen2", {"layer_types": ["full_attention"]}, "layer_types=.*: want 2 of full_attention"),
    ("qwen2", {"layer_types": ["chunked_attention"] * 2}, "layer_types=.*: want 2 of"),
    ("qwen2", {"attention_bias": False}, "attention_bias=False: unknown key"),
    ("smollm3", {"no_rope_layers": [1]}, r"no_rope_layers=\[1\]: want 2 of 0"),
    ("smollm3", {"no_rope_layers": [1, 2]}, r"no_rope_layers=\[1, 2\]: want 2 of 0"),
    ("smollm3", {"no_rope_layer_interval": 0}, "no_rope_layer_interval=0: want a positive whole"),
    ("phi3", {"rope_scaling": {"type": "su", "long_factor": [1.0], "short_factor": [1.0]}},
     "rope_scaling.rope_type='su': not supported; ffn reads default here"),
    ("phi3", {"partial_rotary_factor": 0.5}, "rope_fraction=0.5 of head_dim=6 leaves 3 channels"),
    ("phi3", {"resid_pdrop": 0.1}, "resid_pdrop=0.1, embd_pdrop=0.0: ffn has one dropout for them"),
    ("gemma", {"hidden_activation": "relu"}, "hidden_activation='relu': not supported"),
    ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True: not"),
    ("gemma2", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar=0: want a positive number"),
    ("gemma2", {"final_logit_softcapping": -1.0}, "final_logit_softcapping=-1.0: want a number, 0 or"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "inverse_layer_idx=True: not supported"),
    ("gpt2", {"add_cross_attention": True}, "add_cross_attention=True: not supported"),
    ("gpt2", {"activation_function": "silu_and_mul"}, "activation_function=.*: no such"),
    ("gpt2", {"hidden_size": 12}, "hidden_size=12: n_embd=24 says otherwise"),
    ("gpt_neox", {"rotary_emb_base": 10, "rope_theta": 20.0}, "rope_theta=20.0: rotary_emb_base=10 says"),
    ("gpt_neox", {"rotary_emb_base": 10, "rope_theta": [1]}, "rope_theta=.*: rotary_emb_base=10 says"),
    ("gpt_neox", {"num_key_value_heads": 2}, "num_key_value_heads=2: unknown key"),
    ("bert", {"is_decoder": True}, "is_decoder=True: not supported; want False"),
    ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type=.*: not supported"),
    ("roberta", {"pad_token_id": None}, "pad_token_id=None: want a whole number"),
    ("roberta", {"pad_token_id": 64}, "max_seq_len=-1: want a positive whole number"),
]  # fmt: skip
ROPE = [
    ([1], r"rope_parameters=\[1\]: want a table of keys"),
    ({"rope_type": "longrope"}, "rope_parameters.rope_type='longrope': not supported"),
    ({"rope_type": ["linear"]}, "rope_parameters.rope_type=.*: not supported"),
    ({"factor": 2.0}, "rope_parameters.factor=2.0: rope_type 'default' knows no such key; leave it out"),
    ({"full_attention": {"rope_theta": 1.0}}, "rope_parameters.full_attention=.*: rope_type 'default'"),
    ({"rope_type": "linear"}, "rope_parameters.factor=None: want a number"),
    ({"rope_type": "llama3", "factor": 2.0}, "rope_parameters.low_freq_factor=None: want"),
    ({"rope_type": "linear", "factor": -2.0}, "rope_parameters.factor=-2.0: want a number, 0 or more"),
    ({"rope_type": "linear", "factor": 0}, "rope_scaling=0.0: want a positive number"),
    ({"rope_type": "yarn", "factor": 2.0, "truncate": "yes"}, "truncate='yes': want true or false"),
    ({"rope_type": "yarn", "original_max_position_embeddings": 0}, "want a positive number"),
    ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 0}, "seq_len=0: want a posi"),
    ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": "8"}, "wants a whole number"),
]
UNSUPPORTED += [("llama", {"rope_parameters": inside}, message) for inside, message in ROPE]


@pytest.mark.parametrize(("model_type", "options", "message"), UNSUPPORTED, ids=str)
def test_what_is_not_supported_is_one_line(model_type: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read_config(keys_of(model_type, **options))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700


LLAMA = TransformerConfig(vocab_size=37, dim=24, num_layers=2, num_heads=4, max_seq_len=64)


@pytest.mark.parametrize(
    ("architecture", "options", "message"),
    [
        ("mamba", {}, "model_type='mamba': no such architecture here"),
        ("llama", {"parallel": True}, r"llama: its config.json cannot say parallel=True \(it has False\)$"),
        ("llama", {"norm": "layernorm"}, r"cannot say norm='layernorm' \(it has 'rmsnorm'\)"),
        ("llama", {"activation": "gelu"}, "llama: activation='gelu': hidden_act has no name for it"),
        ("llama", {"position": "learned"}, "llama: position='learned': its positions are rotary"),
        ("llama", {"sliding_window": 8}, r"cannot say sliding_window=8 \(it has None\)"),
        ("llama", {"attention_bias": True}, r"cannot say attention_out_bias=False \(it has True\)"),
        ("llama", {"dim": 26, "head_dim": 6}, "dim=26: llama wants a multiple of num_heads=4"),
        ("llama", {"logit_softcap": 3.0}, "cannot say logit_softcap=3.0"),
        ("gemma2", {"attention_scale": 0.3}, "gemma2: its config.json cannot say .*attention_scale=0.3"),
        ("mistral", {"sliding_window": 8, "full_attention_layers": (1,)}, "say full_attention_layers="),
        ("phi3", {"rope_scaling": 2.0}, "rope_parameters.rope_type='linear': not supported"),
        ("bert", {"head": "none"}, "bert: .*"),
    ],
)  # fmt: skip
def test_what_cannot_be_written_is_one_line(architecture: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        write_config(dataclasses.replace(LLAMA, **options), architecture)
    assert "\n" not in str(caught.value)


def test_what_acts_while_training_is_no_obstacle() -> None:
    training = {"dropout": 0.1, "ffn_dropout": 0.2, "save": "input", "chunk_tokens": 4, "init": "he"}
    assert write_config(dataclasses.replace(LLAMA, **training), "llama") == write_config(LLAMA, "llama")
    assert (
        write_config(dataclasses.replace(LLAMA, attention_dropout=0.3), "llama")["attention_dropout"] == 0.3
    )
