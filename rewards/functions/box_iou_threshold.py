"""Is the box good enough? A bar that a schedule may raise."""

from __future__ import annotations

from rewards.boxes import iou
from rewards.registry import reward
from rewards.types import Answer, Truth


@reward(about="bbox")
def box_iou_threshold(answer: Answer, truth: Truth, *, threshold: float = 0.3) -> float | None:
    """1 when the IoU with the true box is at least `threshold`, in (0, 1]; None when the truth has no box.

    Alone it is too sparse to learn from, unless `threshold` starts low and rises with performance. The function keeps
    no state: whoever trains sets the parameter (`RewardSuite.set_parameter`).
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold must be in (0, 1], got {threshold}")
    if truth.bbox is None:
        return None
    return float(answer.bbox is not None and iou(answer.bbox, truth.bbox) >= threshold)
