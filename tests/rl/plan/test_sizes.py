"""Sizes read from a configuration are those of the model it makes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from rl.config import ConfigError, LoraConfig
from rl.geometry import PUBLISHED
from rl.packed import PackedPolicy
from rl.plan.sizes import ModelSizes, model_sizes

PARAMETERS = {"Qwen/Qwen2.5-VL-3B-Instruct": 3_754_622_976, "Qwen/Qwen2.5-VL-7B-Instruct": 8_292_166_656}
"""As the model pages count them."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_models_have_as_many_parameters_as_published(name: str) -> None:
    sizes = model_sizes(name)
    assert sizes.language.parameters + sizes.vision.parameters == PARAMETERS[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_sizes_make_the_model_they_count(name: str) -> None:
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig.from_dict(dict(PUBLISHED[name])))
    sizes = model_sizes(name)
    visual = sum(p.numel() for p in model.model.visual.parameters())
    assert sizes.vision.parameters == visual
    assert sizes.language.parameters == sum(p.numel() for p in model.parameters()) - visual


def test_the_adapter_has_the_weights_that_are_trained(
    policy: PackedPolicy, sizes: ModelSizes, lora: LoraConfig
) -> None:
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    assert sizes.language.layers * sizes.language.lora_weights(lora) == trained


def test_a_model_that_cannot_be_planned_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"someone/model.*sizes are not known.*name its folder"):
        model_sizes("someone/model")
    vision = {"patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 256}
    (tmp_path / "config.json").write_text(json.dumps({"vision_config": vision}))
    with pytest.raises(ConfigError, match=r"config\.json lacks num_hidden_layers"):
        model_sizes(str(tmp_path))
