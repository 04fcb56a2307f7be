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
CONFIG = PUBLISHED["Qwen/Qwen2.5-VL-3B-Instruct"]
VISION = CONFIG["vision_config"]


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


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", r" is not JSON \("),
        ("[1]", " holds a list"),
        ('{"vision_config": null}', "vision_config lacks out_hidden_size, patch_size"),
        (json.dumps(CONFIG | {"num_attention_heads": "16"}), "num_attention_heads is '16'; a whole number"),
        (json.dumps(CONFIG | {"vision_config": {**VISION, "patch_size": 0}}), "patch_size is 0; a whole"),
        (
            json.dumps(CONFIG | {"vision_config": {**VISION, "deepstack_visual_indexes": [5]}}),
            r"Qwen3-VL does\), which cannot be trained here; set model\.path",
        ),
    ],
)
def test_a_config_that_cannot_be_read_is_named_with_the_field(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=rf"model\.path: {tmp_path}/config\.json.*{words}"):
        model_sizes(str(tmp_path))


def test_a_model_that_cannot_be_planned_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"someone/model.*sizes are not known.*name its folder"):
        model_sizes("someone/model")
    vision = {"patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 256}
    (tmp_path / "config.json").write_text(json.dumps({"vision_config": vision}))
    with pytest.raises(ConfigError, match=r"config\.json lacks num_hidden_layers"):
        model_sizes(str(tmp_path))
