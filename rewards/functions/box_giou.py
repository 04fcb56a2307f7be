"""Generalised overlap of the answered box with the true one: boxes that miss still learn where to go."""

from __future__ import annotations

from rewards.boxes import giou
from rewards.registry import reward
from rewards.types import Answer, Truth


@reward(about="bbox")
def box_giou(answer: Answer, truth: Truth) -> float | None:
    """`(GIoU + 1) / 2` (Rezatofighi et al., CVPR 2019), so that it lies in [0, 1] and is 1 for the true box only.

    0 for a box that cannot be read, None when the truth has no box. Boxes that do not touch score up to 0.5.
    """
    if truth.bbox is None:
        return None
    return 0.0 if answer.bbox is None else (giou(answer.bbox, truth.bbox) + 1) / 2
