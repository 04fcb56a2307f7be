"""3D boxes and their overlap.

Inside, a `Box3D` is half-open in voxels of the volume file's own grid. In text it is the dataset's six
inclusive integers `[start_slice, end_slice, x_min, x_max, y_min, y_max]`. `from_text` and `to_text` are the
only places where one becomes the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Box3D:
    """Half-open box: covers voxels with slice_min <= slice < slice_max, and likewise for x and y.

    Raises:
        ValueError: when an axis has min >= max (a box is never sorted for the caller, and never empty).
    """

    slice_min: int
    slice_max: int
    x_min: int
    x_max: int
    y_min: int
    y_max: int

    def __post_init__(self) -> None:
        for axis in ("slice", "x", "y"):
            low, high = getattr(self, f"{axis}_min"), getattr(self, f"{axis}_max")
            if low >= high:
                raise ValueError(f"Box3D needs {axis}_min < {axis}_max, got {low} and {high}")

    @classmethod
    def from_text(cls, numbers: Sequence[int]) -> Box3D:
        """From six inclusive integers, `[start_slice, end_slice, x_min, x_max, y_min, y_max]`."""
        s0, s1, x0, x1, y0, y1 = numbers
        return cls(s0, s1 + 1, x0, x1 + 1, y0, y1 + 1)

    def to_text(self) -> list[int]:
        """Six inclusive integers, `[start_slice, end_slice, x_min, x_max, y_min, y_max]`."""
        return [self.slice_min, self.slice_max - 1, self.x_min, self.x_max - 1, self.y_min, self.y_max - 1]

    @property
    def volume(self) -> int:
        """Number of voxels covered."""
        return (self.slice_max - self.slice_min) * (self.x_max - self.x_min) * (self.y_max - self.y_min)


def iou(a: Box3D, b: Box3D) -> float:
    """Intersection over union of two boxes, in [0, 1] (Jaccard index of the covered voxels)."""
    overlap = 1
    for axis in ("slice", "x", "y"):
        low = max(getattr(a, f"{axis}_min"), getattr(b, f"{axis}_min"))
        high = min(getattr(a, f"{axis}_max"), getattr(b, f"{axis}_max"))
        if low >= high:
            return 0.0
        overlap *= high - low
    return overlap / (a.volume + b.volume - overlap)
