"""Read Hugging Face's config.json as a TransformerConfig and write it back; unsupported options raise."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from ffn.files.dataclass_toml import flatten
from ffn.gpt.config import RotaryConfig, TransformerConfig
from ffn.interop.hf.decoders import DECODERS
from ffn.interop.hf.encoders import ENCODERS
from ffn.interop.hf.family import Family
from ffn.interop.hf.keys import Keys, refuse

# Keys that do not change a model's outputs: names, token ids, training, text generation.
_HARMLESS = """
    model_type architectures transformers_version torch_dtype dtype auto_map use_cache return_dict torchscript
    output_attentions output_hidden_states gradient_checkpointing chunk_size_feed_forward initializer_range
    bos_token_id eos_token_id pad_token_id sep_token_id cls_token_id mask_token_id unk_token_id
    decoder_start_token_id n_ctx id2label label2id num_labels problem_type finetuning_task tokenizer_class
    prefix task_specific_params use_bfloat16 tf_legacy_loss classifier_dropout attn_implementation
    pretraining_tp cache_implementation unsloth_version unsloth_fixed tie_encoder_decoder name_or_path
    tie_weights_
    max_length max_new_tokens min_length min_new_tokens do_sample early_stopping num_beams num_beam_groups
    diversity_penalty temperature top_k top_p min_p typical_p repetition_penalty length_penalty
    no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores
    return_dict_in_generate forced_bos_token_id forced_eos_token_id remove_invalid_values suppress_tokens
    begin_suppress_tokens exponential_decay_length_penalty summary_type summary_use_proj summary_activation
    summary_proj_to_labels summary_first_dropout reorder_and_upcast_attn qa_dropout seq_classif_dropout
    directionality pooler_fc_size pooler_num_attention_heads pooler_num_fc_layers pooler_size_per_head
    pooler_type
"""
HARMLESS = frozenset(_HARMLESS.split())
NEVER = {  # keys of any model and the only values that are accepted
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "is_decoder": (False, True),  # for decoders; encoders accept False only
    "pruned_heads": ({},),
    "use_bidirectional_attention": (False,),
}
FAMILIES = DECODERS | ENCODERS
TRAINING = ("dropout", "ffn_dropout", "attention_dropout", "save", "chunk_tokens", "init")


def read_config(keys: Mapping[str, Any]) -> TransformerConfig:
    """Return the config of a model from the contents of its config.json.

    Absent keys have the default that transformers gives them in that architecture. Fields that config.json
    has no key for (ffn_dropout, save, chunk_tokens, init) have our defaults.

    Raises:
        ValueError: the architecture is not supported, or a key that changes the outputs is not, or a value
            does not fit.
    """
    family = _family(keys)
    head = _head(keys.get("architectures"), family)
    given = {key: value for key, value in keys.items() if not key.startswith("_")}
    for ours, theirs in family.synonyms.items():
        if ours in given:
            value = given.pop(ours)
            if given.setdefault(theirs, value) != value:
                raise refuse(ours, value, f"must equal {theirs}={given[theirs]}", "leave one of them out")
    _check_known(given, family)
    k = {**family.defaults, **given}
    for key, default in family.defaults.items():
        _check_type(key, k[key], default, family)
    options: dict[str, Any] = dict(family.constants)
    for ours, theirs in family.fields.items():
        options[ours] = k[theirs]
    for part in family.parts:
        options |= part.read(k)
    return TransformerConfig.from_dict(options | {"head": head}, prefix="")


def write_config(config: TransformerConfig, architecture: str) -> dict[str, Any]:
    """Return the contents of a config.json that transformers' from_pretrained reads.

    config.json has no keys for ffn_dropout, save, chunk_tokens and init; they are left out.

    Args:
        architecture: their model_type, such as "llama".

    Raises:
        ValueError: the architecture is unknown, or its config.json cannot express the config.
    """
    family = _family({"model_type": architecture})
    if config.head not in family.classes:
        raise refuse("head", config.head, f"must be {' or '.join(family.classes)} for {architecture}")
    if family.divides and config.dim % config.num_heads:
        rule = f"must be a multiple of num_heads={config.num_heads} for {architecture}"
        raise refuse("dim", config.dim, rule)
    keys: dict[str, Any] = {"model_type": architecture, "architectures": [family.classes[config.head]]}
    keys |= dict.fromkeys(
        ("bos_token_id", "eos_token_id", "pad_token_id")
    )  # else the class's defaults, which may be no tokens here
    c = spelled_out(config)
    for ours, theirs in family.fields.items():
        keys[theirs] = getattr(c, ours)
    for part in family.parts:
        try:
            keys |= part.write(c)
        except ValueError as error:
            raise ValueError(f"{architecture}: {error}") from None
    back, wanted = (flatten(spelled_out(x)) for x in (read_config(keys), config))
    lost = [name for name in wanted if name not in TRAINING and not _same(back[name], wanted[name])]
    if lost:
        said = ", ".join(f"{name}={wanted[name]!r} (reads back as {back[name]!r})" for name in lost)
        raise ValueError(f"{architecture}: config.json cannot express {said}")
    return keys


def spelled_out(config: TransformerConfig) -> TransformerConfig:
    """Return the config of the same model with every derived field written out and every unread one reset."""
    c, usual = config, {field.name: field.default for field in dataclasses.fields(config)}
    unread = {
        "full_attention_layers": c.sliding_window is None,
        "qk_norm_scope": not c.qk_norm,
        "head_activation": c.head != "mlm",
        "tie_embeddings": c.head == "none",
        "logit_softcap": c.head == "none",
    }
    derived: dict[str, Any] = {
        "num_kv_heads": c.kv_heads,
        "head_dim": c.head_channels,
        "hidden_dim": c.hidden_width,
        "attention_out_bias": c.out_bias,
        "attention_scale": c.attention_scale or c.head_channels**-0.5,
        "rotary": _spelled_out_rotary(c) if c.position == "rotary" else RotaryConfig(),
    }
    return dataclasses.replace(c, **{name: usual[name] for name, is_so in unread.items() if is_so} | derived)


def _spelled_out_rotary(c: TransformerConfig) -> RotaryConfig:
    r = c.rotary
    plain = RotaryConfig(r.theta, r.scaling, r.factor, r.fraction, r.skip_layers)
    if r.scaling == "linear":
        return plain
    plain = dataclasses.replace(plain, original_seq_len=r.original_seq_len or c.max_seq_len)
    if r.scaling == "llama3":
        low, high = r.low_freq_factor, r.high_freq_factor
        return dataclasses.replace(plain, low_freq_factor=low, high_freq_factor=high)
    return dataclasses.replace(
        plain,
        beta_fast=r.beta_fast,
        beta_slow=r.beta_slow,
        truncate=r.truncate,
        attention_factor=c.rotary_scaling.amplitude,
    )


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-7)
    return one == other


def _family(keys: Keys) -> Family:
    name = keys.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise refuse("model_type", name, f"must be one of {', '.join(FAMILIES)}")
    return FAMILIES[name]


def _head(architectures: Any, family: Family) -> str:
    """Return our head for the class that was saved."""
    heads = {name: head for head, name in family.classes.items()} | dict(family.other_classes)
    heads[family.sequence_class] = "none"
    if not architectures:
        return next(iter(family.classes))
    known = isinstance(architectures, list) and len(architectures) == 1 and isinstance(architectures[0], str)
    if not known or architectures[0] not in heads:
        raise refuse("architectures", architectures, f"must be one of {', '.join(heads)}")
    return heads[architectures[0]]


def _check_known(given: Keys, family: Family) -> None:
    only = NEVER | dict(family.only)
    for key, value in given.items():
        if value is None or key in family.defaults or (key in HARMLESS and key not in family.only):
            continue
        if key not in only:
            remedy = "delete it from config.json if it does not change the outputs"
            raise refuse(key, value, "is not a known key", remedy)
        if value not in only[key]:
            raise refuse(key, value, f"must be {' or '.join(map(repr, only[key]))}")


def _check_type(key: str, value: Any, default: Any, family: Family) -> None:
    """Raise unless a value has the type of the architecture's default, or is null and may be."""
    if value is None and (default is None or key in family.nullable):
        return
    kinds = {bool: (bool,), int: (int,), float: (int, float), str: (str,)}.get(type(default))
    if kinds is None:
        return
    if (isinstance(value, bool) and bool not in kinds) or not isinstance(value, kinds):
        wanted = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}
        raise refuse(key, value, f"must be {wanted[type(default)]}")
    if isinstance(value, int | float) and not 0 <= value < 1e18:
        raise refuse(key, value, "must be a number, 0 or more")
