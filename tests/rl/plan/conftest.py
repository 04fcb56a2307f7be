"""A small random Qwen2.5-VL with an adapter on its decoder, and its sizes as the plan reads them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from rl.config import LoraConfig
from rl.packed import PackedPolicy
from rl.plan.sizes import ModelSizes, model_sizes

TEXT = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 344,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
    **{"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0},
}
TOWER = {
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "patch_size": 8,
    "window_size": 32,
    "fullatt_block_indexes": [2],
    "out_hidden_size": 64,
}


@pytest.fixture
def lora(request: pytest.FixtureRequest) -> LoraConfig:
    """On all projections, or those a test names."""
    config = LoraConfig(r=4, alpha=8)
    config.target_modules = getattr(request, "param", config.target_modules)
    return config


@pytest.fixture(params=["sdpa", "subtree"])
def policy(lora: LoraConfig, request: pytest.FixtureRequest) -> PackedPolicy:
    """With each attention that runs on a CPU."""
    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(text_config=TEXT, vision_config=TOWER, video_token_id=500)
    names = "|".join(lora.target_modules)
    adapter = PeftLoraConfig(
        r=lora.r, lora_alpha=lora.alpha, target_modules=rf".*language_model.*\.({names})"
    )
    return PackedPolicy(get_peft_model(Qwen2_5_VLForConditionalGeneration(config), adapter), request.param)


@pytest.fixture
def sizes(policy: PackedPolicy, tmp_path: Path) -> ModelSizes:
    (tmp_path / "config.json").write_text(json.dumps(policy.causal_lm.config.to_dict()))
    return model_sizes(str(tmp_path))
