"""Models of transformers that load already swapped, through that library's own door for replaced classes."""

import importlib
from collections.abc import Iterable
from functools import cache

from torch import nn

from ffn.interop.swap.discover import plans
from ffn.interop.swap.reroute import Plan, reroute

# The class that holds the feed-forward lines, by the folder of transformers.models it is written in.
BLOCKS = {
    "bart": ("BartDecoderLayer", "BartEncoderLayer"),
    "bert": ("BertLayer",),
    "clip": ("CLIPMLP",),
    "cohere": ("CohereMLP",),
    "deepseek_v3": ("DeepseekV3MLP",),
    "distilbert": ("FFN",),
    "electra": ("ElectraLayer",),
    "falcon": ("FalconMLP",),
    "gemma": ("GemmaMLP",),
    "gemma2": ("Gemma2MLP",),
    "gemma3": ("Gemma3MLP",),
    "glm4": ("Glm4MLP",),
    "gpt2": ("GPT2MLP",),
    "gpt_neox": ("GPTNeoXMLP",),
    "gptj": ("GPTJMLP",),
    "granite": ("GraniteMLP",),
    "llama": ("LlamaMLP",),
    "mistral": ("MistralMLP",),
    "modernbert": ("ModernBertMLP",),
    "olmo2": ("Olmo2MLP",),
    "opt": ("OPTDecoderLayer",),
    "phi": ("PhiMLP",),
    "phi3": ("Phi3MLP",),
    "qwen2": ("Qwen2MLP",),
    "qwen3": ("Qwen3MLP",),
    "roberta": ("RobertaLayer",),
    "smollm3": ("SmolLM3MLP",),
    "starcoder2": ("Starcoder2MLP",),
    "t5": ("T5DenseActDense", "T5DenseGatedActDense"),
    "vit": ("ViTMLP",),
    "whisper": ("WhisperDecoderLayer", "WhisperEncoderLayer"),
}


def register_with_transformers(model_types: Iterable[str] = tuple(BLOCKS)) -> list[str]:
    """From now on `from_pretrained` and `from_config` give models whose blocks are swapped already.

    Each block is examined as `ffn.swap` does, before its weights are there, and left alone where it is not
    understood. `ffn.unswap(model)` undoes it for a model, `unregister_with_transformers` for models to come.

    Args:
        model_types: folders of transformers.models: a choice of the keys of `BLOCKS`.

    Returns:
        The names of the classes now replaced.

    Raises:
        ValueError: a type that is not in `BLOCKS`, or one that is registered already.
    """
    from transformers.monkey_patching import get_patch_mapping, register_patch_mapping

    wanted = list(model_types)
    if unknown := [name for name in wanted if name not in BLOCKS]:
        raise ValueError(
            f"register_with_transformers: no {', '.join(unknown)}; known are {', '.join(BLOCKS)}"
        )
    mapping = {}
    for model_type in wanted:
        module = importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}")
        mapping |= {name: _arriving(getattr(module, name)) for name in BLOCKS[model_type]}
    if taken := sorted(mapping.keys() & get_patch_mapping().keys()):
        raise ValueError(f"register_with_transformers: {', '.join(taken)} already have a replacement")
    register_patch_mapping(mapping)
    return sorted(mapping)


def unregister_with_transformers() -> None:
    """Models to come are transformers' own again."""
    from transformers.monkey_patching import get_patch_mapping, unregister_patch_mapping

    unregister_patch_mapping(
        [name for name, cls in get_patch_mapping().items() if isinstance(cls, _Arriving)]
    )


class _Arriving(type):
    """The class of classes that stand for another one: what they make is the other's, swapped."""

    original: type

    def __call__(cls, *args, **kwargs):
        module: nn.Module = cls.original(*args, **kwargs)
        plan = next((plan for plan in plans(module) if isinstance(plan, Plan)), None)
        if plan is not None:
            reroute(module, plan)
        return module

    def __instancecheck__(cls, instance) -> bool:
        return isinstance(instance, cls.original)


@cache
def _arriving(original: type) -> type:
    return _Arriving(
        original.__name__, (original,), {"original": original, "__module__": original.__module__}
    )
