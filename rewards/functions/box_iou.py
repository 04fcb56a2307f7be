"""Overlap of the answered box with the true one."""

from __future__ import annotations

from rewards.boxes import iou
from rewards.registry import reward
from rewards.types import Answer, Truth


@reward(about="bbox")
def box_iou(answer: Answer, truth: Truth) -> float | None:
    """`|A n B| / |A u B|` in voxels. 0 for a box that cannot be read, None when the truth has no box."""
    if truth.bbox is None:
        return None
    return 0.0 if answer.bbox is None else iou(answer.bbox, truth.bbox)
