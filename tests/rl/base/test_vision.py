"""Tests of the stand-in base's vision tower."""

from __future__ import annotations

import pytest
import torch

from rl.base.knees import make_knees
from rl.base.model import build_model, build_tokenizer
from rl.base.vision import SMALLEST_VARIANCE, embed_knees, whiten_tower
from rl.config import PhantomConfig, VolumeViewConfig
from rollouts.volumes import PatchSizes


@pytest.mark.slow
def test_whitened_visual_tokens_have_mean_zero_and_equal_variance_in_all_directions() -> None:
    sizes = PatchSizes(8, 2, 2)
    knees = list(make_knees(2, 0, PhantomConfig(), VolumeViewConfig(), sizes))
    visual = build_model(build_tokenizer([]), seed=0).double().model.visual
    raw_N_H = embed_knees(visual, knees, sizes).flatten(0, 1)
    whiten_tower(visual, knees, sizes)
    white_N_H = embed_knees(visual, knees, sizes).flatten(0, 1)
    assert white_N_H.mean(0).abs().max() < 1e-9
    before, after = (torch.linalg.eigvalsh(x.T.cov()) for x in (raw_N_H, white_N_H))
    assert torch.allclose(after, before / (before + SMALLEST_VARIANCE), atol=1e-6)
    assert before.max() / before.clamp(min=1e-12).median() > after.max() / after.clamp(min=1e-12).median()
