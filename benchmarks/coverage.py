"""In how many models of the installed transformers `ffn.swap` takes every dense feed-forward block.

    python -m benchmarks coverage [--kind causal,masked,seq2seq,vision] [--only TYPE,...] [--out DIR]

Every model type that can be built tiny from its configuration, offline, is built and run in float64 before and after the
swap. Which products are feed-forward ones is told without `swap`, by their width, which nothing else in the
tiny model has. A row for each type: swapped (all of them, outputs and gradients equal), left (and why),
wrong (they differ), or why the type could not be built or run.
"""

import argparse
import contextlib
import json
import math
import re
import signal
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

import ffn

KINDS = {
    "causal": ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "AutoModelForCausalLM"),
    "masked": ("MODEL_FOR_MASKED_LM_MAPPING_NAMES", "AutoModelForMaskedLM"),
    "seq2seq": ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES", "AutoModelForSeq2SeqLM"),
    "vision": ("MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES", "AutoModelForImageClassification"),
}
WIDTH, HEADS, HIDDEN = 40, 5, 52  # 4 WIDTH = 160 where a configuration names no hidden width
HEAD = WIDTH // HEADS
SIZES = {  # by the name of a configuration's entry; the first pattern that matches
    r"^(hidden_size|d_model|n_embd|dim|embed_dim|emb_dim|embedding_size|model_dim|encoder_hidden_size|hidden_dim|width)$": WIDTH,
    r"(intermediate_size|ffn_dim|d_ff|dff|dim_ff|d_inner|n_inner|ffn_hidden_size|inner_dim|mlp_dim|feed_forward_size)$": HIDDEN,
    r"(num_hidden_layers|n_layers?|num_layers|encoder_layers|decoder_layers|num_decoder_layers)$": 2,
    r"(num_key_value_heads|num_kv_heads|n_head_kv|num_mem_heads)$": HEADS,
    r"(attention_heads|n_heads?|num_heads)$": HEADS,
    r"^(head_dim|d_kv|attention_head_dim|attention_head_size|qk_head_dim|v_head_dim|qk_nope_head_dim|head_size)$": HEAD,
    r"^(qk_rope_head_dim|rotary_dim)$": HEAD,
    r"^(q_lora_rank|kv_lora_rank)$": 16,
    r"^(vocab_size|n_vocab)$": 99,
    r"^(max_position_embeddings|n_positions|n_ctx|max_seq_len|max_target_positions)$": 64,
    r"(num_experts|num_local_experts|n_routed_experts|moe_num_experts)$": 4,
    r"(num_experts_per_tok|moe_topk|moe_k)$": 2,
    r"^(n_group|topk_group)$": 1,
    r"^image_size$": 32,
    r"^patch_size$": 16,
    r"(pad_token_id|bos_token_id|eos_token_id|decoder_start_token_id)$": 1,
}
SPECIAL = {  # what the names above do not say
    "distilbert": {"hidden_dim": HIDDEN},
    "flaubert": {},
    "reformer": {"is_decoder": True, "axial_pos_shape": (4, 16), "axial_pos_embds_dim": (20, 20)},
    "xmod": {"default_language": "en_XX"},
    "esm": {"vocab_size": 99, "mask_token_id": 2, "pad_token_id": 1},
}


OTHER = re.compile(
    r"^experts$|Mamba|Mixer|Recurrent|DeltaNet|SSM"
)  # what has a hidden width and is no such block


class Unbuildable(Exception):
    """This type cannot be built tiny, or run; the message says why."""


@contextlib.contextmanager
def deadline(seconds: int) -> Iterator[None]:
    def late(*_):
        raise Unbuildable(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def shrink(config) -> None:
    """Tiny sizes in a configuration and those within it."""
    layers = max(getattr(config, "num_hidden_layers", 0) or 0, 0)
    for key, value in list(vars(config).items()):
        if hasattr(value, "to_dict"):
            shrink(value)
        elif (isinstance(value, int) and not isinstance(value, bool)) or (
            value is None and key in ("head_dim", "num_key_value_heads")
        ):
            size = next((size for pattern, size in SIZES.items() if re.search(pattern, key)), None)
            if size is not None:
                with contextlib.suppress(Exception):  # some are properties that others follow from
                    setattr(config, key, size)
    for key, value in list(vars(config).items()):  # lists with an entry a layer
        if isinstance(value, list) and layers > 2 and len(value) == layers:
            with contextlib.suppress(Exception):
                setattr(config, key, value[:1] + value[-1:])


def build(transformers, kind: str, model_type: str) -> nn.Module:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    torch.manual_seed(0)
    try:
        with deadline(60):
            config = CONFIG_MAPPING[model_type]()
            shrink(config)
            for key, value in SPECIAL.get(model_type, {}).items():
                setattr(config, key, value)
            model = getattr(transformers, KINDS[kind][1]).from_config(config).double()
            if hasattr(model, "set_experts_implementation"):
                with contextlib.suppress(Exception):
                    model.set_experts_implementation("eager")
            return model
    except Exception as error:
        raise Unbuildable(f"not built: {said(error)}") from None


def said(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:120] if text else ''}"


def run(model: nn.Module, kind: str) -> dict[str, Tensor]:
    """The outputs, and the gradient of every parameter, for fixed inputs."""
    g = torch.Generator().manual_seed(1)
    if kind == "vision":
        size = getattr(model.config, "image_size", 32)
        inputs = {
            "pixel_values": torch.randn(
                2,
                3,
                32 if not isinstance(size, int) else size,
                32 if not isinstance(size, int) else size,
                generator=g,
                dtype=torch.float64,
            )
        }
    else:
        inputs = {"input_ids": torch.randint(5, 90, (2, 8), generator=g)}
    if kind == "seq2seq":
        inputs["decoder_input_ids"] = torch.randint(5, 90, (2, 6), generator=g)
    model.zero_grad()
    model.eval()
    try:
        with deadline(60):
            torch.manual_seed(2)
            logits = model(**inputs, **({} if kind == "vision" else {"use_cache": False})).logits
            weight = torch.randn(logits.shape, generator=g, dtype=torch.float64)
            (logits * weight).sum().backward()
    except Exception as error:
        raise Unbuildable(f"not run: {said(error)}") from None
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **gradients}


def dense_products(model: nn.Module) -> set[str]:
    """Paths of the products into or out of the hidden width, outside of mixtures of experts."""
    found = set()
    for path, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.ndim == 2 and not isinstance(module, nn.Embedding):
            widths = set(weight.shape)
            inside = (type(model.get_submodule(path.rpartition(".")[0])).__name__, *path.split("."))
            if widths & {HIDDEN, 2 * HIDDEN, 4 * WIDTH, 8 * WIDTH} and not any(map(OTHER.search, inside)):
                found.add(path)
    return found


def examine(transformers, kind: str, model_type: str) -> dict:
    row = {"kind": kind, "model_type": model_type}
    try:
        model = build(transformers, kind, model_type)
        run(model, kind)  # some settle on something in their first run
        before = run(model, kind)
        report = ffn.swap(model)
        wanted, taken = dense_products(model), set()
        for path, module in model.named_modules():
            plan = vars(module).get("_ffn_plan")
            for product in (*plan.first, plan.last) if plan else ():
                taken.add(f"{path}.{product}".lstrip("."))
        after = run(model, kind)
    except Unbuildable as error:
        return row | {"outcome": "unbuilt", "reason": str(error)}
    # a gradient that is zero but for rounding (a key's bias) has no size of its own to be compared with
    floor = 1e-6 * max(float(a.abs().max()) for a in before.values())
    apart = max(
        float((a - after[n]).abs().max() / (floor + a.abs().max())) if n in after else math.inf
        for n, a in before.items()
    )
    reasons = Counter(f"{b.kind}: {b.reason}" for b in report.left)
    missed = sorted(wanted - taken)
    row |= {
        "blocks": len(report.swapped),
        "left": len(report.left),
        "apart": apart,
        "classes": sorted({b.kind for b in report.swapped}),
    }
    if apart > 1e-9:
        return row | {"outcome": "wrong", "reason": f"differs by {apart:.1e}"}
    if not wanted:
        return row | {"outcome": "none", "reason": "; ".join(reasons) or "no dense feed-forward block"}
    if missed:
        return row | {
            "outcome": "left",
            "reason": "; ".join(reasons) or f"not seen: {missed[:3]}",
            "missed": missed[:6],
        }
    return row | {"outcome": "swapped", "reason": ""}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks coverage")
    parser.add_argument("--kind", default=",".join(KINDS))
    parser.add_argument("--only", default="")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args(argv)
    import transformers
    from transformers.models.auto import modeling_auto

    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    rows = []
    for kind in options.kind.split(","):
        types = getattr(modeling_auto, KINDS[kind][0])
        for model_type in options.only.split(",") if options.only else types:
            if model_type not in types:
                continue
            rows.append(examine(transformers, kind, model_type))
            print(json.dumps({k: v for k, v in rows[-1].items() if k != "classes"}), flush=True)
        print(kind, Counter(row["outcome"] for row in rows if row["kind"] == kind))


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
