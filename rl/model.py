"""Loading the base model, its tokenizer and its adapters for training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen2_5_VLForConditionalGeneration

from rl.config import Config, ConfigError
from rl.environment import pick_attention, pick_device, pick_dtype
from rl.errors import staged_folder
from rl.heap import keep_freed_memory
from rl.packed import PackedPolicy
from rollouts.adapters import check_adapter, linear_shapes

BUILTIN = {"builtin:base": "assets/base"}
"""Models that ship with the package."""
REFERENCE = "reference"
"""Name of the frozen adapter the KL penalty is measured against."""


def resolve_model(path: str) -> Path:
    """Local folder of a model: the built-in one, a folder, or a Hugging Face id (downloaded on first use).

    Raises:
        ConfigError: a built-in name that does not exist.
    """
    if path.startswith("builtin:"):
        if path not in BUILTIN:
            raise ConfigError(f"model.path {path!r} is unknown; built in: {', '.join(BUILTIN)}")
        return Path(str(files("rl") / BUILTIN[path]))
    if Path(path).is_dir():
        return Path(path)
    if path.count("/") != 1 or path.startswith((".", "/")):
        raise ConfigError(f"model.path {path!r} is neither a folder nor a Hugging Face id like owner/name")
    return Path(snapshot_download(path, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja"]))


def load_tokenizer(model_path: Path) -> PreTrainedTokenizerBase:
    """The model's own tokenizer."""
    return AutoTokenizer.from_pretrained(model_path)


def load_policy(
    config: Config, adapter: Path | None = None, *, reference: Path | None = None
) -> PackedPolicy:
    """The base with a trainable LoRA adapter on its language model, vision tower left out, ready to train.

    Args:
        adapter: PEFT folder to continue from; None starts a fresh adapter from `config.model.lora`.
        reference: adapter of the frozen policy that `reference_adapter` switches to.
    Raises:
        ConfigError: the device or the attention cannot be had.
        rollouts.adapters.AdapterError: the adapter does not fit the base.
    """
    device = pick_device(config.model.device)
    attention = pick_attention(config.model.attention, device)
    if device.type == "cpu":
        keep_freed_memory()
    base = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        resolve_model(config.model.path), dtype=pick_dtype(config.model.dtype, device)
    )
    base.model.visual = nn.Identity()  # features come from the cache
    if adapter is None:
        model = get_peft_model(base, _fresh_lora(config))
    else:
        linears = linear_shapes(base)
        check_adapter(adapter, linears)
        model = PeftModel.from_pretrained(base, adapter, is_trainable=True)
        if reference is not None:
            check_adapter(reference, linears)
            model.load_adapter(reference, REFERENCE, is_trainable=False)
            model.set_adapter("default")
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # bf16 loses updates smaller than 1/256 of a weight
    policy = PackedPolicy(model.to(device), attention)
    if config.model.gradient_checkpointing:
        policy.language_model.gradient_checkpointing_enable({"use_reentrant": False})
    return policy.train()


def save_adapter(policy: PackedPolicy, folder: Path) -> None:
    """Write the trained adapter as a PEFT folder, complete or not at all.

    Raises:
        WriteError: the disk is full, say; the former adapter stays.
    """
    with staged_folder(folder) as staging:
        policy.model.save_pretrained(staging, selected_adapters=["default"], safe_serialization=True)


def disable_dropout(policy: nn.Module) -> None:
    """GRPO scores what the engine sampled, and the engine has no dropout."""
    for module in policy.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def trainable(policy: nn.Module) -> list[nn.Parameter]:
    """The parameters an optimizer gets."""
    return [p for p in policy.parameters() if p.requires_grad]


def _fresh_lora(config: Config) -> PeftLoraConfig:
    lora = config.model.lora
    modules = "|".join(lora.target_modules)
    return PeftLoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        # a pattern, because the vision tower has modules of the same names
        target_modules=rf".*language_model.*\.({modules})",
        task_type="CAUSAL_LM",
    )


@contextmanager
def reference_adapter(policy: PackedPolicy) -> Iterator[None]:
    """Within it the policy is the one training started from, frozen."""
    policy.model.set_adapter(REFERENCE, inference_mode=True)
    try:
        yield
    finally:
        policy.model.set_adapter("default")


@contextmanager
def weights_of(policy: PackedPolicy, weights: Sequence[torch.Tensor] | None) -> Iterator[None]:
    """Within it the trainable parameters have these values, in the order of `trainable`; None changes nothing."""
    if weights is None:
        yield
        return
    parameters = trainable(policy)
    present = [p.data for p in parameters]
    for parameter, value in zip(parameters, weights, strict=True):
        parameter.data = value
    try:
        yield
    finally:
        for parameter, value in zip(parameters, present, strict=True):
            parameter.data = value
