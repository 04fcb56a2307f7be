"""Has the box about the right size, wherever it is?"""

from __future__ import annotations

from rewards.registry import reward
from rewards.types import Answer, Truth


@reward(about="bbox")
def box_size_validity(answer: Answer, truth: Truth, *, factor: float = 2.0) -> float | None:
    """`(1/3) sum_axis [1/factor <= answered extent / true extent <= factor]`, over slices, x and y.

    0 for a box that cannot be read, None when the truth has no box. It keeps a box that still misses from growing to
    the whole volume; a box of the right size in the wrong place scores full, so it belongs beside `box_iou`.
    """
    if not factor >= 1:
        raise ValueError(f"factor must be at least 1, got {factor}")
    if truth.bbox is None:
        return None
    if answer.bbox is None:
        return 0.0
    extents = zip(answer.bbox.extents, truth.bbox.extents, strict=True)
    return sum(true <= factor * given and given <= factor * true for given, true in extents) / 3
