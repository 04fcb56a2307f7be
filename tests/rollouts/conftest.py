"""A tiny random Qwen2.5-VL with its tokenizer, and examples on small volumes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

from rewards.ontology import QUESTIONS
from rewards.types import Example, Truth, VolumeRef
from rl.base.model import create_base
from rl.config import VolumeViewConfig
from rollouts.prompts import question_text
from rollouts.types import VolumeFeatures


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
