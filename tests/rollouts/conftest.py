"""A tiny random Qwen2.5-VL with its tokenizer, and examples on small volumes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration

from rewards.ontology import QUESTIONS
from rewards.types import Example, Truth, VolumeRef
from rl.base.model import create_base
from rl.config import VolumeViewConfig
from rollouts.positions import mrope_positions
from rollouts.prompts import question_text
from rollouts.types import NO_PICTURE, Prompt, VolumeFeatures


@pytest.fixture
def view() -> VolumeViewConfig:
    """Two by four tokens in-plane, for patches of 8 pixels."""
    return VolumeViewConfig(height=32, width=64)


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint folder of a random base model whose tokenizer knows the questions."""
    corpus = [question_text(question) for question in QUESTIONS.values()]
    return create_base(tmp_path_factory.mktemp("base"), seed=0, corpus=corpus)


@pytest.fixture
def make_volume(tmp_path: Path) -> Callable[..., VolumeRef]:
    """Writes a random NIfTI volume of 40 x 48 x 7 voxels (x, y, slice) and returns its reference."""

    def make(name: str, seed: int = 0, shape: tuple[int, ...] = (40, 48, 7)) -> VolumeRef:
        array = np.random.default_rng(seed).normal(100, 20, shape).astype(np.float32)
        path = tmp_path / f"{name}.nii.gz"
        nibabel.save(nibabel.Nifti1Image(array, np.diag([0.5, 0.5, 2.0, 1.0])), path)
        x, y, slices = shape
        return VolumeRef(name, str(path), None, (slices, x, y), (2.0, 0.5, 0.5))

    return make


@pytest.fixture
def make_example() -> Callable[..., Example]:
    """An example that asks question `question_id` about a volume that need not exist."""

    def make(question_id: int, volume: VolumeRef | None = None) -> Example:
        volume = volume or VolumeRef("9_00M_1_2_1", "absent.nii.gz", None, (7, 40, 48), (2.0, 0.5, 0.5))
        return Example(
            example_id=f"{volume.volume_id}_{question_id}",
            volume=volume,
            question=QUESTIONS[question_id],
            truth=Truth({}, None),
            patient_id="9",
            visit="00M",
            side="right",
        )

    return make


@pytest.fixture
def features() -> VolumeFeatures:
    """Twelve visual tokens of width 256."""
    generator = torch.Generator().manual_seed(0)
    return VolumeFeatures("f" * 32, torch.randn(12, 256, generator=generator), (3, 4, 4), 1.0)


@pytest.fixture(scope="session")
def make_prompt(base_folder: Path) -> Callable[..., Prompt]:
    """A prompt about random volume `volume` (4 x 2 x 2 visual tokens); `question` seeds its words."""
    config = AutoConfig.from_pretrained(base_folder)
    ordinary = range(20, 400)

    def make(volume: int, question: int, words: int = 25, embeds_V_H: torch.Tensor | None = None) -> Prompt:
        generator = torch.Generator().manual_seed(volume)
        if embeds_V_H is None:
            embeds_V_H = torch.randn(16, config.text_config.hidden_size, generator=generator)
        features = VolumeFeatures(f"volume-{volume}", embeds_V_H, (4, 4, 4), 1.5)
        volume_ids = (ordinary[1], ordinary[2], *[config.video_token_id] * 16, ordinary[3])
        rng = np.random.default_rng(question)
        question_ids = tuple(int(i) for i in rng.choice(list(ordinary), words))
        return Prompt(f"{volume}_{question}", features, volume_ids, question_ids)

    return make


@pytest.fixture(scope="session")
def no_picture(make_prompt: Callable[..., Prompt]) -> Prompt:
    """A prompt that shows no volume."""
    whole = make_prompt(0, 3)
    return replace(whole, example_id="blind", features=NO_PICTURE, volume_ids=whole.volume_ids[:2])


@pytest.fixture(scope="session")
def make_adapter(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """A LoRA adapter of the language model with LoRA_B != 0, so that it changes every answer."""

    @cache
    def make(seed: int) -> Path:
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(base_folder, dtype=torch.float32)
        targets = r".*language_model\..*\.(q|k|v|o|gate|up|down)_proj"
        adapted = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=targets))
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.data.normal_(0, 0.1, generator=generator)
        folder = tmp_path_factory.mktemp(f"adapter{seed}")
        adapted.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def score(base_folder: Path) -> Callable[..., list[float]]:
    """Log-probabilities of a rollout's tokens by one plain forward over the whole sequence, no cache.

    Positions are the reference's, LoRA is folded into the weights by hand: nothing is shared with the engines.
    """

    @cache
    def model_with(adapter: Path | None) -> Qwen2_5_VLForConditionalGeneration:
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(base_folder, dtype=torch.float32).eval()
        if adapter is not None:
            config = json.loads((adapter / "adapter_config.json").read_text())
            tensors = load_file(adapter / "adapter_model.safetensors")
            for name in {n.rsplit(".lora_", 1)[0] for n in tensors}:
                a, b = (tensors[f"{name}.lora_{half}.weight"] for half in "AB")
                weight = model.get_submodule(name.removeprefix("base_model.model.")).weight
                weight.data += b @ a * (config["lora_alpha"] / config["r"])
        return model

    @torch.no_grad()
    def score(
        prompt: Prompt, token_ids: tuple[int, ...], temperature: float, adapter: Path | None = None
    ) -> list:
        model, features = model_with(adapter), prompt.features
        ids = [*prompt.token_ids, *token_ids]
        positions = mrope_positions(
            ids,
            None if features.absent else features.grid_thw,
            features.second_per_grid_t,
            video_token_id=model.config.video_token_id,
            merge_size=model.config.vision_config.spatial_merge_size,
            tokens_per_second=model.config.vision_config.tokens_per_second,
        )
        embeds = model.get_input_embeddings()(torch.tensor([ids]))
        if not features.absent:
            embeds[torch.tensor([ids]) == model.config.video_token_id] = features.embeds_V_H
        hidden = model.model.language_model(
            inputs_embeds=embeds, position_ids=positions[:, None]
        ).last_hidden_state
        logps = (model.lm_head(hidden[0, len(prompt.token_ids) - 1 : -1]) / (temperature or 1)).log_softmax(
            -1
        )
        return logps.gather(-1, torch.tensor(token_ids)[:, None])[:, 0].tolist()

    return score
