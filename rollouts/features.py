"""Checks that every consumer of cached features makes before it uses them.

An engine given embeddings of a wrong width or with too few rows can hang, accepts too many rows silently, and
one NaN volume corrupts the request after it: so nothing unchecked reaches it.
"""

from __future__ import annotations

import torch

from rewards.errors import ReasonKneeError
from rollouts.types import VolumeFeatures

FEATURE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class FeatureError(ReasonKneeError, ValueError):
    """Features that must not reach a model; the message names the volume, what is wrong and the remedy."""


def validate_features(features: VolumeFeatures, hidden_size: int, merge: int, volume_id: str = "") -> None:
    """Check shape against grid, width, type, temporal step and finiteness.

    Args:
        hidden_size: the language model's; merge: `spatial_merge_size`; volume_id: named in the error when given.
    Raises:
        FeatureError: on the first check that fails.
    """
    named = (
        f"features of volume {volume_id} (key {features.key})" if volume_id else f"features {features.key}"
    )
    remedy = "; delete the entry and embed the volume again"
    embeds, grid = features.embeds_V_H, features.grid_thw
    if len(grid) != 3 or min(grid) < 1 or grid[1] % merge or grid[2] % merge:
        raise FeatureError(
            f"{named}: grid_thw {grid} must be three positive numbers, rows and columns multiples of {merge}"
        )
    if embeds.ndim != 2:
        raise FeatureError(
            f"{named}: shape {tuple(embeds.shape)}, expected [visual tokens, hidden size]{remedy}"
        )
    expected = grid[0] * (grid[1] // merge) * (grid[2] // merge)
    if embeds.shape[0] != expected:
        raise FeatureError(
            f"{named}: {embeds.shape[0]} rows, but grid_thw {grid} makes {expected} visual tokens{remedy}"
        )
    if embeds.shape[1] != hidden_size:
        raise FeatureError(
            f"{named}: width {embeds.shape[1]}, but the language model's is {hidden_size}; embed with this model"
        )
    if embeds.dtype not in FEATURE_DTYPES:
        raise FeatureError(f"{named}: type {embeds.dtype}, expected one of {FEATURE_DTYPES}{remedy}")
    if not 0 < features.second_per_grid_t < float("inf"):
        raise FeatureError(
            f"{named}: second_per_grid_t {features.second_per_grid_t}, must be positive{remedy}"
        )
    if not bool(torch.isfinite(embeds).all()):
        bad = int((~torch.isfinite(embeds)).sum())
        raise FeatureError(f"{named}: {bad} NaN or infinite values of {embeds.numel()}{remedy}")
