"""Features that could hang an engine or spoil another request are refused, by name."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rollouts.features import FeatureError, validate_features
from rollouts.types import VolumeFeatures


def test_good_features_pass(features: VolumeFeatures) -> None:
    validate_features(features, 256, 2)
    validate_features(replace(features, embeds_V_H=features.embeds_V_H.bfloat16()), 256, 2, "knee")


def nan_at(features: VolumeFeatures, value: float) -> VolumeFeatures:
    embeds = features.embeds_V_H.clone()
    embeds[3, 7] = value
    return replace(features, embeds_V_H=embeds)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda f: replace(f, embeds_V_H=f.embeds_V_H[:-1]), "11 rows.*makes 12 visual tokens"),
        (lambda f: replace(f, embeds_V_H=torch.cat([f.embeds_V_H, f.embeds_V_H])), "24 rows.*makes 12"),
        (
            lambda f: replace(f, embeds_V_H=f.embeds_V_H[:, :128]),
            "width 128, but the language model's is 256",
        ),
        (lambda f: replace(f, embeds_V_H=f.embeds_V_H[None]), r"shape \(1, 12, 256\)"),
        (lambda f: replace(f, embeds_V_H=f.embeds_V_H.double()), "type torch.float64"),
        (lambda f: replace(f, embeds_V_H=f.embeds_V_H.int()), "type torch.int32"),
        (lambda f: replace(f, grid_thw=(3, 4, 5)), r"grid_thw \(3, 4, 5\)"),
        (lambda f: replace(f, grid_thw=(0, 4, 4)), r"grid_thw \(0, 4, 4\)"),
        (lambda f: replace(f, second_per_grid_t=0.0), "second_per_grid_t 0.0"),
        (lambda f: replace(f, second_per_grid_t=float("nan")), "second_per_grid_t nan"),
        (lambda f: nan_at(f, float("nan")), "1 NaN or infinite values of 3072"),
        (lambda f: nan_at(f, float("inf")), "1 NaN or infinite values of 3072"),
    ],
)
def test_bad_features_are_refused_and_the_volume_is_named(
    features: VolumeFeatures, fault, message: str
) -> None:
    with pytest.raises(FeatureError, match=rf"volume knee_7 .*{message}"):
        validate_features(fault(features), 256, 2, "knee_7")
