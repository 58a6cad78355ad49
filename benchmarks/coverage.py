"""Count the models of the installed transformers in which `ffn.swap` swaps every dense feed-forward block.

    python -m benchmarks coverage [--kind causal,masked,seq2seq,vision] [--only TYPE,...] [--out DIR]

Each model type is built offline from its default configuration with tiny sizes, and run before and after the
swap in float64 (in float32 if float64 fails). The expected feed-forward products are found without `swap`: by
their width, which no other product in the tiny model has; in vision models, where widths differ by stage, by
their names. One row per type:

    swapped   all blocks are swapped, outputs and gradients are equal
    left      some block is left, with the reason
    wrong     outputs or gradients differ
    none      the model has no dense block
    unbuilt   the model could not be built or run

Rows go to DIR/coverage.jsonl, and a table to DIR/coverage.md (to docs/coverage.md for benchmarks/results).
"""

import contextlib
import json
import math
import re
import signal
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import ffn
from benchmarks.report import RESULTS, arguments, listed, machine, read
from ffn.files.atomic import write_file

KINDS = {  # (name of the list of types in transformers, auto class)
    "causal": ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "AutoModelForCausalLM"),
    "masked": ("MODEL_FOR_MASKED_LM_MAPPING_NAMES", "AutoModelForMaskedLM"),
    "seq2seq": ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES", "AutoModelForSeq2SeqLM"),
    "vision": ("MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES", "AutoModelForImageClassification"),
}
OUTCOMES = ("swapped", "left", "wrong", "none", "unbuilt")
WIDTH, HEADS, HIDDEN = 40, 5, 52  # the hidden width is 4 WIDTH = 160 if a configuration has no entry for it
HEAD = WIDTH // HEADS
SIZES = {  # pattern of a configuration's entry: size; the first match counts
    r"^(hidden_size|d_model|n_embd|dim|embed_dim|emb_dim|embedding_size|model_dim)$": WIDTH,
    r"^(encoder_hidden_size|hidden_dim|width)$": WIDTH,
    r"(intermediate_size|ffn_dim|d_ff|dff|dim_ff|d_inner|n_inner|ffn_hidden_size)$": HIDDEN,
    r"(inner_dim|mlp_dim|feed_forward_size)$": HIDDEN,
    r"(num_hidden_layers|n_layers?|num_layers|encoder_layers|decoder_layers|num_decoder_layers)$": 2,
    r"(num_key_value_heads|num_kv_heads|n_head_kv|num_mem_heads)$": HEADS,
    r"^(mamba_d_head|mamba_headdim)$": 16,
    r"^mamba_d_ssm$": 2 * WIDTH,
    r"(attention_heads|n_heads?|num_heads)$": HEADS,
    r"^(head_dim|d_kv|attention_head_dim|attention_head_size|qk_head_dim|v_head_dim|head_size)$": HEAD,
    r"^(qk_nope_head_dim|qk_rope_head_dim|rotary_dim)$": HEAD,
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
SPECIAL: dict[str, dict[str, Any]] = {  # entries by model type, where the patterns are not enough
    "codegen": {"n_head": 4, "rotary_dim": 8},
    "deepseek_v2": {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 2},
    "diffllama": {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 10},
    "distilbert": {"hidden_dim": HIDDEN},
    "esm": {"vocab_size": 99, "mask_token_id": 2, "pad_token_id": 1},
    "led": {"attention_window": [4, 4]},
    "longformer": {"attention_window": [4, 4]},
    "reformer": {"is_decoder": True, "axial_pos_shape": (4, 16), "axial_pos_embds_dim": (20, 20)},
    "xmod": {"default_language": "en_XX"},
}
WIDTHS = {HIDDEN, 2 * HIDDEN, 4 * WIDTH, 8 * WIDTH}
NAMES = re.compile(
    r"(^|\.)(fc[12]|fc1_[gx]|(gate|up|down|gate_up)_proj|c_fc|lin[12]|linear[12]|w[io]|wi_[01]|w[123]"
    r"|dense_h_to_4h|dense_4h_to_h|pwconv[12]|dense[12]|intermediate\.dense|output\.dense)$"
)
OTHER = re.compile(
    r"^experts$|[Aa]ttention|^attn$|Mamba|Mixer|Recurrent|DeltaNet|SSM|Conv|MixMLP"
)  # modules with products of the same widths that are not feed-forward blocks


class Unbuildable(Exception):
    """This model type cannot be built or run; the message says why."""


@contextlib.contextmanager
def attempt(what: str, seconds: int = 60) -> Iterator[None]:
    """Turn any error of their code, or a timeout, into Unbuildable."""

    def late(*_):
        raise TimeoutError(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    except Exception as error:  # noqa: BLE001 (their code may raise anything)
        lines = str(error).strip().splitlines()
        raise Unbuildable(f"not {what}: {type(error).__name__}: {lines[0][:120] if lines else ''}") from None
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def shrink(config) -> None:
    """Set tiny sizes in a configuration and its nested configurations."""
    layers = max(getattr(config, "num_hidden_layers", 0) or 0, 0)
    for key, value in list(vars(config).items()):
        whole = isinstance(value, int) and not isinstance(value, bool)
        if hasattr(value, "to_dict"):
            shrink(value)
        elif whole or (value is None and key in ("head_dim", "num_key_value_heads")):
            size = next((size for pattern, size in SIZES.items() if re.search(pattern, key)), None)
            if size is not None:
                with contextlib.suppress(Exception):  # some entries are read-only properties
                    setattr(config, key, size)
    for key, value in list(vars(config).items()):  # lists with one entry per layer
        if isinstance(value, list) and layers > 2 and len(value) == layers:
            with contextlib.suppress(Exception):
                setattr(config, key, value[:1] + value[-1:])


def build(kind: str, model_type: str, tiny: bool, dtype: torch.dtype) -> nn.Module:
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    torch.manual_seed(0)
    with attempt("built"):
        config = CONFIG_MAPPING[model_type]()
        if tiny:
            shrink(config)
            for key, value in SPECIAL.get(model_type, {}).items():
                setattr(config, key, value)
        model = getattr(transformers, KINDS[kind][1]).from_config(config).to(dtype)
        with contextlib.suppress(Exception):  # grouped matmuls of experts do not support float64
            model.set_experts_implementation("eager")
        return model.eval()


def run(model: nn.Module, kind: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the outputs and the gradients of all parameters, for fixed inputs."""
    g = torch.Generator().manual_seed(1)
    inputs: dict[str, Any] = {"use_cache": False, "input_ids": torch.randint(5, 90, (2, 8), generator=g)}
    if kind == "vision":
        size = getattr(model.config, "image_size", None)
        size = size if isinstance(size, int) else 224
        inputs = {"pixel_values": torch.randn(1, 3, size, size, generator=g).to(dtype)}
    if kind == "seq2seq":
        inputs["decoder_input_ids"] = torch.randint(5, 90, (2, 6), generator=g)
    model.zero_grad()
    torch.manual_seed(2)
    with attempt("run"):
        logits = model(**inputs).logits
        (logits * torch.randn(logits.shape, generator=g).to(logits)).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    found = {"logits": logits.detach(), **gradients}
    if not all(bool(tensor.isfinite().all()) for tensor in found.values()):
        raise Unbuildable("not run: its own outputs or gradients are not finite")
    return found


def apart(before: dict[str, Tensor], after: dict[str, Tensor]) -> float:
    """Return the largest difference relative to the largest element of each tensor.

    A floor for that element covers gradients that are zero up to rounding (of a key's bias).
    """
    floor = 1e-6 * max(float(a.abs().max()) for a in before.values())
    if before.keys() != after.keys():
        return math.inf
    return max(float((a - after[n]).abs().max() / (floor + a.abs().max())) for n, a in before.items())


def dense_products(model: nn.Module, by_width: bool) -> set[str]:
    """Return the paths of the products of dense feed-forward blocks, found by width or else by name."""
    found = set()
    for path, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or weight.ndim != 2 or isinstance(module, nn.Embedding):
            continue
        parts = path.split(".")
        holders = [type(model.get_submodule(".".join(parts[:i]))).__name__ for i in range(1, len(parts))]
        wide = bool(WIDTHS & set(weight.shape)) if by_width else NAMES.search(path) is not None
        if wide and not any(map(OTHER.search, (*parts, *holders))):
            found.add(path)
    return found


def swapped_products(model: nn.Module) -> set[str]:
    plans = {path: vars(module).get("_ffn_plan") for path, module in model.named_modules()}
    return {
        f"{path}.{p}".lstrip(".") for path, plan in plans.items() if plan for p in (*plan.first, plan.last)
    }


def examine(kind: str, model_type: str) -> dict:
    """Return the row of one type: tiny in float64, else tiny in float32, else (vision) in its own sizes."""
    ways = [(True, torch.float64), (True, torch.float32)]
    if kind == "vision":
        ways += [(False, torch.float32)]
    first = None
    for tiny, dtype in ways:
        try:
            row = measure(kind, model_type, tiny, dtype)
        except Unbuildable as error:
            first = first or str(error)
            continue
        return row
    return {"kind": kind, "model_type": model_type, "outcome": "unbuilt", "reason": first}


def measure(kind: str, model_type: str, tiny: bool, dtype: torch.dtype) -> dict:
    model = build(kind, model_type, tiny, dtype)
    run(model, kind, dtype)  # some models change their state in the first run
    before = run(model, kind, dtype)
    report = ffn.swap(model)
    difference = apart(before, run(model, kind, dtype))
    wanted = dense_products(model, by_width=tiny and kind != "vision")
    missed = sorted(wanted - swapped_products(model))
    reasons = "; ".join(Counter(f"{block.kind}: {block.reason}" for block in report.left))
    if difference > (1e-9 if dtype == torch.float64 else 1e-3):
        outcome = "wrong"
    elif missed:
        outcome, reasons = "left", reasons or f"not seen: {', '.join(missed[:3])}"
    else:
        outcome = "swapped" if report.swapped else "none"
    return {
        "kind": kind, "model_type": model_type, "outcome": outcome, "blocks": len(report.swapped),
        "classes": sorted({block.kind for block in report.swapped}), "apart": difference,
        "dtype": str(dtype)[6:], "tiny": tiny, "missed": missed[:6], "reason": reasons,
    }  # fmt: skip


def table(rows: list[dict], versions: str) -> str:
    """Return the rows in Markdown: counts by kind, each type that is not swapped, the names of the others."""
    lines = [
        "# Models of transformers that `ffn.swap` swaps",
        "",
        f"By `python -m benchmarks coverage`, {versions}.",
        "",
    ]
    lines += [
        f"| kind | types | {' | '.join(OUTCOMES)} | swapped, of types with a dense block |",
        "|---" * 8 + "|",
    ]
    for kind in KINDS:
        counts = Counter(row["outcome"] for row in rows if row["kind"] == kind)
        if not counts:
            continue
        dense = counts["swapped"] + counts["left"] + counts["wrong"]
        cells = " | ".join(str(counts[outcome]) for outcome in OUTCOMES)
        lines.append(f"| {kind} | {counts.total()} | {cells} | {counts['swapped'] / max(dense, 1):.1%} |")
    lines += ["", "| kind | type | outcome | why |", "|---|---|---|---|"]
    order = sorted(rows, key=lambda row: (list(KINDS).index(row["kind"]), OUTCOMES.index(row["outcome"])))
    for row in order:
        if row["outcome"] != "swapped":
            why = (row["reason"] or "no dense feed-forward block").replace("|", "\\|")
            lines.append(f"| {row['kind']} | {row['model_type']} | {row['outcome']} | {why} |")
    for kind in KINDS:
        names = [row["model_type"] for row in rows if (row["kind"], row["outcome"]) == (kind, "swapped")]
        if names:
            lines += ["", f"Swapped, {kind}: {', '.join(names)}."]
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> None:
    parser = arguments("coverage", __doc__)
    parser.add_argument("--kind", type=listed(*KINDS), default=[*KINDS], help=f"any of {', '.join(KINDS)}")
    parser.add_argument("--only", type=listed(), default=[], help="only these model types; write no files")
    options = parser.parse_args(argv)
    import transformers
    from transformers.models.auto import modeling_auto

    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    rows, facts = [], machine() | {"transformers": transformers.__version__}
    for kind in options.kind:
        types = getattr(modeling_auto, KINDS[kind][0])
        for model_type in options.only or types:
            if model_type in types:
                row = examine(kind, model_type)
                rows.append(row | facts)
                print(f"{kind:8} {model_type:28} {row['outcome']:8} {row['reason'][:120]}", flush=True)
    counts = Counter((row["kind"], row["outcome"]) for row in rows)
    print("\n".join(f"{kind} {outcome}: {count}" for (kind, outcome), count in counts.items()))
    if not options.only:
        options.out.mkdir(parents=True, exist_ok=True)
        file = options.out / "coverage.jsonl"
        rows = [row for row in read(file) if row["kind"] not in options.kind] + rows
        versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
        write_file(file, "".join(json.dumps(row) + "\n" for row in rows))
        page = RESULTS.parents[1] / "docs" if options.out.resolve() == RESULTS.resolve() else options.out
        write_file(page / "coverage.md", table(rows, versions))
