"""The supported encoders, with the defaults that transformers gives to absent keys."""

from ffn.gpt.config import TransformerConfig
from ffn.interop.hf.family import Family
from ffn.interop.hf.keys import PLAIN, POSITIONS_AFTER_PAD, KeyPair, activation, refuse


def _encoder(name: str) -> dict[str, str]:
    return {"none": f"{name}Model", "mlm": f"{name}ForMaskedLM"}


def _has_types(c: TransformerConfig) -> dict[str, int]:
    if not c.num_token_types:
        raise refuse("num_token_types", 0, "must be 1 or more")
    return {}


TOKEN_TYPES = KeyPair(lambda k: {}, _has_types)
_CONSTANTS = {
    "causal": False, "position": "learned", "norm": "layernorm", "norm_position": "post", "bias": True,
    "attention_bias": True, "embedding_norm": True,
}  # fmt: skip

BERT = Family(
    classes=_encoder("Bert"),
    other_classes={"BertForPreTraining": "mlm"},
    defaults={
        "vocab_size": 30522, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
        "intermediate_size": 3072, "hidden_act": "gelu", "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1, "max_position_embeddings": 512, "type_vocab_size": 2,
        "layer_norm_eps": 1e-12, "tie_word_embeddings": True,
    },
    fields={
        "vocab_size": "vocab_size", "dim": "hidden_size", "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads", "hidden_dim": "intermediate_size",
        "max_seq_len": "max_position_embeddings", "num_token_types": "type_vocab_size",
        "norm_eps": "layer_norm_eps", "tie_embeddings": "tie_word_embeddings",
        "dropout": "hidden_dropout_prob", "attention_dropout": "attention_probs_dropout_prob",
    },
    parts=(activation("hidden_act", PLAIN, head=True), TOKEN_TYPES),
    constants=_CONSTANTS,
    only={"is_decoder": (False,), "position_embedding_type": ("absolute",)},
)  # fmt: skip

ROBERTA = Family(
    classes=_encoder("Roberta"),
    defaults=dict(BERT.defaults) | {"vocab_size": 50265, "pad_token_id": 1},
    fields={ours: theirs for ours, theirs in BERT.fields.items() if ours != "max_seq_len"},
    parts=(activation("hidden_act", PLAIN), POSITIONS_AFTER_PAD, TOKEN_TYPES),
    constants=_CONSTANTS | {"head_activation": "gelu"},
    only=BERT.only,
)

DISTILBERT = Family(
    classes=_encoder("DistilBert"),
    defaults={
        "vocab_size": 30522, "dim": 768, "n_layers": 6, "n_heads": 12, "hidden_dim": 4 * 768,
        "activation": "gelu", "max_position_embeddings": 512, "dropout": 0.1, "attention_dropout": 0.1,
        "tie_word_embeddings": True, "sinusoidal_pos_embds": False,  # which only initializes the table
    },
    fields={
        "vocab_size": "vocab_size", "dim": "dim", "num_layers": "n_layers", "num_heads": "n_heads",
        "hidden_dim": "hidden_dim", "max_seq_len": "max_position_embeddings",
        "tie_embeddings": "tie_word_embeddings", "dropout": "dropout",
        "attention_dropout": "attention_dropout",
    },
    parts=(activation("activation", PLAIN, head=True),),
    constants=_CONSTANTS | {"norm_eps": 1e-12},
    only={"is_decoder": (False,)},
    synonyms={"hidden_size": "dim", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads"},
)  # fmt: skip

ENCODERS = {"bert": BERT, "distilbert": DISTILBERT, "roberta": ROBERTA}
