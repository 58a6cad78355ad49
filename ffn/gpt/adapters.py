"""LoRA adapters: add them to a Transformer, train them alone, save, load, merge and remove them.

    add_adapters(model, AdapterConfig(rank=8))
    train_only(model, "lora")                        # of ffn.gpt.freeze; then train as usual
    save_adapters("adapter.safetensors", model)
    load_adapters("adapter.safetensors", base)       # the same base gives the same outputs
    merge_adapters(base)                             # plain Linears with W + (alpha / rank) B A

Here an adapter is always a LoRA adapter: two matrices A and B of low rank beside the weight of a Linear. The
Linears keep their names and weights: adapters only add lora_A and lora_B beside each weight in the state
dict. The model is a Transformer or a module that holds one.

Source: Hu et al. 2021.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from ffn.files.atomic import replacing
from ffn.files.dataclass_toml import from_dict, settle
from ffn.files.shards import open_shards, write_tensors
from ffn.gpt.freeze import transformer_in
from ffn.gpt.transformer import Transformer
from ffn.nn.lora import LoRALinear
from ffn.nn.plain import plain_parameters
from ffn.packing.pack import is_packed

FILE = "adapter.safetensors"
TARGETS = {
    "ffn": ("gate_proj", "up_proj", "down_proj"),
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
}


@dataclass(frozen=True)
class AdapterConfig:
    """Rank, strength and targets of LoRA adapters; checked when built.

    Raises:
        ValueError: rank is below 1, alpha is not positive, dropout is outside [0, 1), or a target is unknown.
    """

    rank: int = 8
    alpha: float = 16.0  # B A is multiplied by alpha / rank
    dropout: float = 0.0  # of the input of A, while training
    targets: tuple[str, ...] = ("ffn",)  # ffn, attention, or names of their Linears: up_proj, ...

    def __post_init__(self) -> None:
        settle(self)
        if self.rank < 1:
            raise ValueError(f"rank must be 1 or more, got {self.rank}")
        if not self.alpha > 0:
            raise ValueError(f"alpha must be positive, got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be a probability in [0, 1), got {self.dropout}")
        known = [*TARGETS, *(name for names in TARGETS.values() for name in names)]
        wrong = [target for target in self.targets if target not in known]
        if wrong or not self.targets:
            raise ValueError(f"targets must be among {', '.join(known)}; got {', '.join(wrong) or 'none'}")


def add_adapters(model: nn.Module, config: AdapterConfig | None = None) -> list[str]:
    """Add an adapter to each target Linear and return the names of the Linears. Outputs do not change yet.

    Call `ffn.gpt.freeze.train_only(model, "lora")` to train the adapters alone. The feed-forward blocks then
    save no more for backward than without adapters.

    Raises:
        ValueError: the model has adapters already, or a target Linear is hooked, replaced or parametrized.
    """
    transformer, config = transformer_in(model), config or AdapterConfig()
    if adapter_config(model) is not None:
        raise ValueError("model has adapters already; call merge_adapters or remove_adapters first")
    linears = dict(_chosen(transformer, config))
    for name, linear in linears.items():
        if plain_parameters(linear) is None:
            kind = "a packed one; call ffn.unpack first" if is_packed(linear) else type(linear).__name__
            raise ValueError(f"{name} must be a plain nn.Linear without hooks, got {kind}")
    for name, linear in linears.items():
        _put(transformer, name, LoRALinear(linear, config.rank, config.alpha, config.dropout))
    return list(linears)


def adapter_config(model: nn.Module) -> AdapterConfig | None:
    """Return the config of the adapters, with names of Linears as targets; None without adapters."""
    adapted = dict(_adapted(transformer_in(model)))
    if not adapted:
        return None
    one = next(iter(adapted.values()))
    targets = tuple(dict.fromkeys(name.rpartition(".")[2] for name in adapted))
    return AdapterConfig(one.rank, one.scale * one.rank, one.dropout, targets)


def remove_adapters(model: nn.Module) -> None:
    """Replace adapted Linears by plain ones with their unchanged weights, bit for bit."""
    transformer = transformer_in(model)
    for name, linear in list(_adapted(transformer)):
        _put(transformer, name, linear.plain())


def merge_adapters(model: nn.Module) -> None:
    """Add the adapters to the weights and remove them: plain Linears, the same outputs up to rounding."""
    for _, linear in _adapted(transformer_in(model)):
        linear.merge()
    remove_adapters(model)


def save_adapters(path: str | Path, model: nn.Module) -> Path:
    """Write the adapters without their base, atomically, and return the file.

    Args:
        path: a file ending in .safetensors, or a folder for adapter.safetensors.

    Raises:
        ValueError: the model has no adapters.
        OSError: the file could not be written; a file that was there stays as it was.
    """
    transformer, config, file = transformer_in(model), adapter_config(model), _file(path)
    if config is None:
        raise ValueError("model has no adapters to save; see add_adapters")
    facts = {**asdict(config), "base": fingerprint(transformer)}
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as partial:
        write_tensors(partial, _factors(transformer), {"adapter": json.dumps(facts, sort_keys=True)})
    return file


@torch.no_grad()
def load_adapters(path: str | Path, model: nn.Module, *, check_base: bool = True) -> None:
    """Add saved adapters to their base.

    Args:
        path: as in `save_adapters`.
        check_base: if False, only the names and shapes of the base have to match, not its weights.

    Raises:
        ValueError: the file holds no adapters, the base is another one, or the model has adapters already.
            The model then stays as it was.
        TypeError: model is no module.
    """
    transformer, file = transformer_in(model), _file(path)
    shards = open_shards(file)
    try:
        facts = json.loads(shards.metadata["adapter"])
        base = facts.pop("base")
        config = from_dict(AdapterConfig, facts)
    except (KeyError, TypeError, AttributeError, ValueError):
        raise ValueError(f"{file}: not adapters saved by ffn") from None
    wanted = {}
    for name, linear in _chosen(transformer, config):
        wanted[f"{name}.lora_A"] = (config.rank, linear.in_features)
        wanted[f"{name}.lora_B"] = (linear.out_features, config.rank)
    found = {name: spec.shape for name, spec in shards.specs.items()}
    for name in [*wanted, *found]:
        if wanted.get(name) != found.get(name):
            got, need = found.get(name, "absent"), wanted.get(name, "absent")
            raise ValueError(f"{file}: saved for another base: {name} must be {need} here, got {got}")
    if check_base and base != (here := fingerprint(transformer)):
        raise ValueError(
            f"{file}: saved for a base with other weights: fingerprint {base[:12]}, here {here[:12]}"
        )
    tensors = dict(shards)
    add_adapters(transformer, config)
    for name, parameter in _factors(transformer).items():
        parameter.copy_(tensors[name])


def fingerprint(model: nn.Module) -> str:
    """Return the SHA-256 of a Transformer's names, shapes and weights, without its adapters.

    Half precision is hashed as float32, so a model and its float32 copy have the same fingerprint.
    """
    digest = hashlib.sha256()
    for name, tensor in transformer_in(model).state_dict().items():
        if ".lora_" in name:
            continue
        wide = tensor.float() if tensor.dtype.itemsize < 4 else tensor
        digest.update(f"{name} {tuple(wide.shape)} ".encode())
        digest.update(wide.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _chosen(transformer: Transformer, config: AdapterConfig) -> Iterator[tuple[str, nn.Linear]]:
    """Yield the target Linears by name, adapted or not."""
    names = {name for target in config.targets for name in TARGETS.get(target, (target,))}
    for name, module in transformer.blocks.named_modules():
        if name.rpartition(".")[2] in names:
            yield f"blocks.{name}", module  # pyright: ignore[reportReturnType]


def _adapted(transformer: Transformer) -> Iterator[tuple[str, LoRALinear]]:
    for name, module in transformer.named_modules():
        if isinstance(module, LoRALinear):
            yield name, module


def _factors(transformer: Transformer) -> dict[str, nn.Parameter]:
    return {
        f"{name}.{factor}": getattr(linear, factor)
        for name, linear in _adapted(transformer)
        for factor in ("lora_A", "lora_B")
    }


def _put(transformer: Transformer, name: str, linear: nn.Linear) -> None:
    parent, _, child = name.rpartition(".")
    setattr(transformer.get_submodule(parent), child, linear)


def _file(path: str | Path) -> Path:
    path = Path(path)
    return path if path.suffix == ".safetensors" else path / FILE
