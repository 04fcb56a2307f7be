"""Checks that a LoRA adapter fits its base before anything serves or trains it.

vLLM loads an adapter with foreign key names without an error and then answers as the base model; PEFT leaves
missing tensors at their initial values. So every tensor is accounted for here: nothing unknown, nothing missing,
every shape right.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from rewards.errors import ReasonKneeError

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
_PREFIX = "base_model.model."
_SHOWN = 3

LinearShapes = Mapping[str, tuple[int, int]]
"""Module name -> (out_features, in_features)."""


class AdapterError(ReasonKneeError, ValueError):
    """An adapter that does not fit; the message names the folder, the tensor or field, and the remedy."""


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """What a checked adapter is."""

    rank: int
    alpha: float
    modules: tuple[str, ...]
    """Names of the adapted modules in the base model, e.g. `model.language_model.layers.0.self_attn.q_proj`."""


def linear_shapes(model: torch.nn.Module) -> dict[str, tuple[int, int]]:
    """Every linear layer of a language model inside a vision-language model (LoRA adapts nothing else here)."""
    return {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ".language_model." in f".{name}"
    }


@lru_cache(maxsize=4)
def linear_shapes_of(model_path: str) -> LinearShapes:
    """`linear_shapes` from the model's configuration alone: no weights are read or allocated."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(model_path)
    with torch.device("meta"):
        return linear_shapes(AutoModelForImageTextToText.from_config(config))


def check_adapter(folder: Path, linears: LinearShapes, max_rank: int | None = None) -> AdapterInfo:
    """Check that every tensor of a PEFT LoRA adapter lands in the base, and that none it needs is missing.

    Args:
        folder: holds `adapter_config.json` and `adapter_model.safetensors` as PEFT writes them.
        linears: `linear_shapes(model)` or `linear_shapes_of(path)` of the base.
        max_rank: largest rank the engine has room for.
    Raises:
        AdapterError: missing file, unsupported kind of adapter, foreign, missing, misshapen or non-finite tensor.
    """
    config = _read_config(folder)
    rank = config["r"]
    if max_rank is not None and rank > max_rank:
        raise AdapterError(
            f"adapter {folder}: rank {rank}, but the engine was started for at most {max_rank}"
        )
    shapes = _read_shapes(folder)
    expected: dict[str, tuple[int, int]] = {}
    for name, (n_out, n_in) in linears.items():
        if _is_target(config, name):
            expected[f"{_PREFIX}{name}.lora_A.weight"] = (rank, n_in)
            expected[f"{_PREFIX}{name}.lora_B.weight"] = (n_out, rank)
    _refuse(folder, "do not belong to this base", [n for n in shapes if n not in expected], _example(linears))
    _refuse(
        folder,
        f"are missing ({CONFIG} names their modules as targets)",
        [n for n in expected if n not in shapes],
    )
    wrong = [f"{n} {shapes[n]}, base needs {expected[n]}" for n in shapes if shapes[n] != expected[n]]
    _refuse(folder, "have the wrong shape", wrong, "was it trained on another base?")
    if not expected:
        raise AdapterError(
            f"adapter {folder}: target_modules {config['target_modules']!r} match no language model layer"
        )
    modules = tuple(sorted({name[len(_PREFIX) :].rsplit(".lora_", 1)[0] for name in shapes}))
    return AdapterInfo(rank, float(config["lora_alpha"]), modules)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise AdapterError(
            f"{path} does not exist; an adapter is a folder as PEFT's save_pretrained writes it"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise AdapterError(f"{path}: not JSON ({error})") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise AdapterError(f"{path}: peft_type is not LORA; only LoRA adapters can be served")
    for name in ("r", "lora_alpha", "target_modules"):
        if not config.get(name):
            raise AdapterError(f"{path}: {name} is missing")
    if type(config["r"]) is not int or type(config["lora_alpha"]) not in (int, float):
        raise AdapterError(
            f"{path}: r is {config['r']!r} and lora_alpha {config['lora_alpha']!r}; an integer and a number are needed"
        )
    # vLLM either ignores these silently or cannot serve them
    for name, plain in (("bias", "none"), ("use_dora", False), ("fan_in_fan_out", False)):
        if config.get(name, plain) != plain:
            raise AdapterError(
                f"{path}: {name}={config[name]!r} is not supported; train with {name}={plain!r}"
            )
    for name in (
        "modules_to_save",
        "rank_pattern",
        "alpha_pattern",
        "layer_replication",
        "trainable_token_indices",
    ):
        if config.get(name):
            raise AdapterError(f"{path}: {name}={config[name]!r} is not supported; train without it")
    return config


def _read_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    path = folder / WEIGHTS
    if not path.is_file():
        hint = (
            "; adapter_model.bin is a pickle and is not read"
            if (folder / "adapter_model.bin").exists()
            else ""
        )
        raise AdapterError(f"{path} does not exist{hint}; save the adapter as safetensors")
    shapes = {}
    try:
        with safe_open(path, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                tensor = tensors.get_tensor(name)
                if not (tensor.is_floating_point() and bool(torch.isfinite(tensor).all())):
                    raise AdapterError(
                        f"{path}: tensor {name} ({tensor.dtype}) is not finite; the training diverged"
                    )
                shapes[name] = tuple(tensor.shape)
    except SafetensorError as error:
        raise AdapterError(f"{path}: not a readable safetensors file ({error})") from error
    return shapes


def _is_target(config: Mapping[str, Any], module: str) -> bool:
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    names = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
    targets = config["target_modules"]
    if isinstance(targets, str) and targets == "all-linear":
        return True
    return bool(check_target_module_exists(LoraConfig(**{n: config.get(n) for n in names}), module))


def _example(linears: LinearShapes) -> str:
    first = next(iter(linears), "")
    return f"this base's are named like {_PREFIX}{first}.lora_A.weight"


def _refuse(folder: Path, what: str, names: list[str], hint: str = "") -> None:
    if names:
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        shown = ", ".join(sorted(names)[:_SHOWN])
        raise AdapterError(
            f"adapter {folder}: {len(names)} tensors {what}: {shown}{more}{'; ' + hint if hint else ''}"
        )
