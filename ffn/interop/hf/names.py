"""Tables of weight names, one per architecture: rows `ours: theirs`, with * for the layer's number."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Row:
    """The place of one of our modules in theirs.

    Args:
        name: of their module.
        tied_bias: of their bias in a model with a tied head, if it differs.
        members: our modules that share their tensor, in the order of its rows.
        index: of this module among the members.
        packing: "rows" for one member after the other, "heads" for the members of each head together.
        transposed: True if their weight is (in, out).
    """

    name: str
    tied_bias: str = ""
    members: tuple[str, ...] = ()
    index: int = 0
    packing: str = "rows"
    transposed: bool = False


@dataclass(frozen=True)
class Table:
    """The names of one architecture.

    Args:
        prefix: of every name, absent in the files of a base model.
        rows: our module -> its place in theirs.
        tied: with a tied head, the name of a copy -> the name of its source.
        ignored: names of tensors that are not needed.
        old_endings: the ending of a name in old files -> its ending now.
    """

    prefix: str
    rows: Mapping[str, Row]
    tied: Mapping[str, str]
    ignored: re.Pattern[str]
    old_endings: Mapping[str, str] = field(default_factory=dict)


def _rows(names: Mapping[str, str], *, transposed: tuple[str, ...] = ()) -> dict[str, Row]:
    return {ours: Row(theirs, transposed=ours in transposed) for ours, theirs in names.items()}


def _packed(members: tuple[str, ...], name: str, packing: str = "rows", transposed: bool = False) -> dict:
    return {
        ours: Row(name, members=members, index=i, packing=packing, transposed=transposed)
        for i, ours in enumerate(members)
    }


_QKV = tuple(f"blocks.*.attention.{name}_proj" for name in "qkv")
_GATE_UP = ("blocks.*.feed_forward.gate_proj", "blocks.*.feed_forward.up_proj")
_UNUSED = re.compile(r"rotary_emb\.inv_freq$|^score\.weight$")

_ENDS = {
    "embedding.token": "model.embed_tokens",
    "blocks.*.attention.o_proj": "model.layers.*.self_attn.o_proj",
    "blocks.*.feed_forward.down_proj": "model.layers.*.mlp.down_proj",
    "norm": "model.norm",
    "head": "lm_head",
}
_PROJECTIONS = {
    "blocks.*.attention.q_proj": "model.layers.*.self_attn.q_proj",
    "blocks.*.attention.k_proj": "model.layers.*.self_attn.k_proj",
    "blocks.*.attention.v_proj": "model.layers.*.self_attn.v_proj",
    "blocks.*.feed_forward.gate_proj": "model.layers.*.mlp.gate_proj",
    "blocks.*.feed_forward.up_proj": "model.layers.*.mlp.up_proj",
}
_QK_NORMS = {
    "blocks.*.attention.q_norm": "model.layers.*.self_attn.q_norm",
    "blocks.*.attention.k_norm": "model.layers.*.self_attn.k_norm",
}
_NORMS = {
    "blocks.*.attention_norm": "model.layers.*.input_layernorm",
    "blocks.*.feed_forward_norm": "model.layers.*.post_attention_layernorm",
}
_OUTPUT_NORMS = {
    "blocks.*.attention_norm": "model.layers.*.post_attention_layernorm",
    "blocks.*.feed_forward_norm": "model.layers.*.post_feedforward_layernorm",
}
_SANDWICH_NORMS = {
    "blocks.*.attention_norm": "model.layers.*.input_layernorm",
    "blocks.*.attention_out_norm": "model.layers.*.post_attention_layernorm",
    "blocks.*.feed_forward_norm": "model.layers.*.pre_feedforward_layernorm",
    "blocks.*.feed_forward_out_norm": "model.layers.*.post_feedforward_layernorm",
}


def _llama_like(*parts: Mapping[str, Row]) -> Table:
    rows = {ours: row for part in (_rows(_ENDS), *parts) for ours, row in part.items()}
    return Table("model.", rows, {"lm_head.weight": "model.embed_tokens.weight"}, _UNUSED)


_PHI3 = _packed(_QKV, "model.layers.*.self_attn.qkv_proj") | _packed(  # the gate first
    _GATE_UP, "model.layers.*.mlp.gate_up_proj"
)
_GPT2_LINEARS = {
    "blocks.*.attention.o_proj": "transformer.h.*.attn.c_proj",
    "blocks.*.feed_forward.up_proj": "transformer.h.*.mlp.c_fc",
    "blocks.*.feed_forward.down_proj": "transformer.h.*.mlp.c_proj",
}
GPT2 = Table(
    "transformer.",
    _rows(
        {
            "embedding.token": "transformer.wte",
            "embedding.position": "transformer.wpe",
            "blocks.*.attention_norm": "transformer.h.*.ln_1",
            "blocks.*.feed_forward_norm": "transformer.h.*.ln_2",
            "norm": "transformer.ln_f",
            "head": "lm_head",
        }
        | _GPT2_LINEARS,
        transposed=tuple(_GPT2_LINEARS),
    )
    | _packed(_QKV, "transformer.h.*.attn.c_attn", transposed=True),
    {"lm_head.weight": "transformer.wte.weight"},
    re.compile(r"h\.\d+\.attn\.(bias|masked_bias)$|^score\.weight$"),
)
GPT_NEOX = Table(
    "gpt_neox.",
    _rows(
        {
            "embedding.token": "gpt_neox.embed_in",
            "blocks.*.attention_norm": "gpt_neox.layers.*.input_layernorm",
            "blocks.*.attention.o_proj": "gpt_neox.layers.*.attention.dense",
            "blocks.*.feed_forward_norm": "gpt_neox.layers.*.post_attention_layernorm",
            "blocks.*.feed_forward.up_proj": "gpt_neox.layers.*.mlp.dense_h_to_4h",
            "blocks.*.feed_forward.down_proj": "gpt_neox.layers.*.mlp.dense_4h_to_h",
            "norm": "gpt_neox.final_layer_norm",
            "head": "lm_head",
        }
    )
    | _packed(_QKV, "gpt_neox.layers.*.attention.query_key_value", packing="heads"),
    {"lm_head.weight": "gpt_neox.embed_in.weight"},
    re.compile(r"attention\.(bias|masked_bias|rotary_emb\.inv_freq)$|^score\.weight$"),
    {"embed_out.weight": "lm_head.weight"},
)

_BERT_BODY = {
    "embedding.token": "embeddings.word_embeddings",
    "embedding.position": "embeddings.position_embeddings",
    "embedding.token_type": "embeddings.token_type_embeddings",
    "embedding.norm": "embeddings.LayerNorm",
    "blocks.*.attention.q_proj": "encoder.layer.*.attention.self.query",
    "blocks.*.attention.k_proj": "encoder.layer.*.attention.self.key",
    "blocks.*.attention.v_proj": "encoder.layer.*.attention.self.value",
    "blocks.*.attention.o_proj": "encoder.layer.*.attention.output.dense",
    "blocks.*.attention_norm": "encoder.layer.*.attention.output.LayerNorm",
    "blocks.*.feed_forward.up_proj": "encoder.layer.*.intermediate.dense",
    "blocks.*.feed_forward.down_proj": "encoder.layer.*.output.dense",
    "blocks.*.feed_forward_norm": "encoder.layer.*.output.LayerNorm",
}
_TF = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}  # names from TensorFlow


def _bert_like(prefix: str, head: Mapping[str, Row], tied: Mapping[str, str], ignored: str) -> Table:
    rows = _rows({ours: prefix + theirs for ours, theirs in _BERT_BODY.items()}) | dict(head)
    table = f"{prefix}embeddings.word_embeddings.weight"
    return Table(
        prefix, rows, {copy: source or table for copy, source in tied.items()}, re.compile(ignored), _TF
    )


BERT = _bert_like(
    "bert.",
    _rows(
        {
            "head.transform.dense": "cls.predictions.transform.dense",
            "head.transform.norm": "cls.predictions.transform.LayerNorm",
        }
    )
    | {"head": Row("cls.predictions.decoder", tied_bias="cls.predictions.bias")},
    {"cls.predictions.decoder.weight": "", "cls.predictions.decoder.bias": "cls.predictions.bias"},
    r"embeddings\.position_ids$|(^|\.)pooler\.dense\.(weight|bias)$|^cls\.(seq_relationship\..*|predictions\.bias)$"
    r"|^classifier\.(weight|bias)$",
)
ROBERTA = _bert_like(
    "roberta.",
    _rows({"head.transform.dense": "lm_head.dense", "head.transform.norm": "lm_head.layer_norm"})
    | {"head": Row("lm_head.decoder", tied_bias="lm_head.bias")},
    {"lm_head.decoder.weight": "", "lm_head.decoder.bias": "lm_head.bias"},
    r"embeddings\.position_ids$|(^|\.)pooler\.dense\.(weight|bias)$|^lm_head\.bias$"
    r"|^classifier\.(dense|out_proj)\.(weight|bias)$",
)
DISTILBERT = Table(
    "distilbert.",
    _rows(
        {
            "embedding.token": "distilbert.embeddings.word_embeddings",
            "embedding.position": "distilbert.embeddings.position_embeddings",
            "embedding.norm": "distilbert.embeddings.LayerNorm",
            "blocks.*.attention.q_proj": "distilbert.transformer.layer.*.attention.q_lin",
            "blocks.*.attention.k_proj": "distilbert.transformer.layer.*.attention.k_lin",
            "blocks.*.attention.v_proj": "distilbert.transformer.layer.*.attention.v_lin",
            "blocks.*.attention.o_proj": "distilbert.transformer.layer.*.attention.out_lin",
            "blocks.*.attention_norm": "distilbert.transformer.layer.*.sa_layer_norm",
            "blocks.*.feed_forward.up_proj": "distilbert.transformer.layer.*.ffn.lin1",
            "blocks.*.feed_forward.down_proj": "distilbert.transformer.layer.*.ffn.lin2",
            "blocks.*.feed_forward_norm": "distilbert.transformer.layer.*.output_layer_norm",
            "head.transform.dense": "vocab_transform",
            "head.transform.norm": "vocab_layer_norm",
            "head": "vocab_projector",
        }
    ),
    {"vocab_projector.weight": "distilbert.embeddings.word_embeddings.weight"},
    re.compile(r"embeddings\.position_ids$|^(pre_)?classifier\.(weight|bias)$"),
    _TF,
)

_LLAMA = _llama_like(_rows(_PROJECTIONS), _rows(_NORMS))
TABLES = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "smollm3", "gemma"), _LLAMA),
    "qwen3": _llama_like(_rows(_PROJECTIONS), _rows(_NORMS), _rows(_QK_NORMS)),
    "olmo2": _llama_like(_rows(_PROJECTIONS), _rows(_OUTPUT_NORMS), _rows(_QK_NORMS)),
    "gemma2": _llama_like(_rows(_PROJECTIONS), _rows(_SANDWICH_NORMS)),
    "phi3": _llama_like(_PHI3, _rows(_NORMS)),
    "gpt2": GPT2,
    "gpt_neox": GPT_NEOX,
    "bert": BERT,
    "distilbert": DISTILBERT,
    "roberta": ROBERTA,
}
