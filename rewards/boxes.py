"""3D boxes and their overlap.

Inside, a `Box3D` is half-open in voxels of the volume file's own grid. In text it is the dataset's six
inclusive integers `[start_slice, end_slice, x_min, x_max, y_min, y_max]`. `from_text` and `to_text` are the
only places where one becomes the other; corners and millimetres are half-open too.

Overlaps are counted in voxels; all voxels of a volume have the same size, so the overlap in mm^3 is the same.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass
from typing import Literal, SupportsIndex

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.integer]
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Box3D:
    """Half-open box: covers voxels with slice_min <= slice < slice_max, and likewise for x and y.

    NumPy's integers are taken and kept as Python's, which do not overflow.

    Raises:
        ValueError: when an axis has min >= max (a box is never sorted for the caller, and never empty), or a bound is
            no integer.
    """

    slice_min: int
    slice_max: int
    x_min: int
    x_max: int
    y_min: int
    y_max: int

    def __post_init__(self) -> None:
        # written out: every box of every completion passes here
        slices = type(self.slice_min) is type(self.slice_max) is int
        plane = type(self.x_min) is type(self.x_max) is type(self.y_min) is type(self.y_max) is int
        if not (slices and plane):
            for name in self.__slots__:
                object.__setattr__(self, name, _integer(getattr(self, name)))
        if self.slice_min < self.slice_max and self.x_min < self.x_max and self.y_min < self.y_max:
            return
        for axis in ("slice", "x", "y"):
            low, high = getattr(self, f"{axis}_min"), getattr(self, f"{axis}_max")
            if low >= high:
                raise ValueError(f"Box3D needs {axis}_min < {axis}_max, got {low} and {high}")

    @classmethod
    def from_text(cls, numbers: Sequence[int]) -> Box3D:
        """From six inclusive integers, `[start_slice, end_slice, x_min, x_max, y_min, y_max]`."""
        if len(numbers) != 6:
            raise ValueError(f"a box has six numbers, got {list(numbers)}")
        # before the ends are counted in: 255 + 1 is 0 in NumPy's uint8
        s0, s1, x0, x1, y0, y1 = map(_integer, numbers)
        return cls(s0, s1 + 1, x0, x1 + 1, y0, y1 + 1)

    def to_text(self) -> list[int]:
        """Six inclusive integers, `[start_slice, end_slice, x_min, x_max, y_min, y_max]`."""
        return [self.slice_min, self.slice_max - 1, self.x_min, self.x_max - 1, self.y_min, self.y_max - 1]

    @classmethod
    def from_corners(cls, low: Sequence[int], high: Sequence[int]) -> Box3D:
        """From its lowest corner and the one just beyond its highest, each (slice, x, y)."""
        (s0, x0, y0), (s1, x1, y1) = low, high
        return cls(s0, s1, x0, x1, y0, y1)

    def to_corners(self) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """Its lowest corner and the one just beyond its highest, each (slice, x, y)."""
        return (self.slice_min, self.x_min, self.y_min), (self.slice_max, self.x_max, self.y_max)

    def to_mm(self, spacing_mm: Sequence[float]) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Both corners in mm from the outer corner of voxel (0, 0, 0); `spacing_mm` is (slice, x, y)."""
        low, high = (tuple(n * mm for n, mm in zip(c, spacing_mm, strict=True)) for c in self.to_corners())
        return low, high

    @classmethod
    def from_mm(cls, low: Sequence[float], high: Sequence[float], spacing_mm: Sequence[float]) -> Box3D:
        """From both corners in mm, as `to_mm` gives them; each bound goes to the nearest border between voxels.

        Raises:
            ValueError: a number that is not finite, or an axis that is left without a voxel.
        """
        if not all(map(math.isfinite, (*low, *high))):
            raise ValueError(f"corners in mm must be finite, got {list(low)} and {list(high)}")
        corners = ([round(n / mm) for n, mm in zip(c, spacing_mm, strict=True)] for c in (low, high))
        return cls.from_corners(*corners)

    def shifted(self, slices: int, x: int, y: int) -> Box3D:
        """The box moved by so many voxels along each axis."""
        (s0, x0, y0), (s1, x1, y1) = self.to_corners()
        return Box3D(s0 + slices, s1 + slices, x0 + x, x1 + x, y0 + y, y1 + y)

    def mirrored(self, slices: int) -> Box3D:
        """The box in the same volume with its `slices` in the opposite order."""
        return Box3D(
            slices - self.slice_max, slices - self.slice_min, self.x_min, self.x_max, self.y_min, self.y_max
        )

    def canonical(self, side: Literal["right", "left"], slices: int) -> Box3D:
        """The box as on a right knee, so that medial and lateral are at the same end for both sides.

        Slices run along the patient's left-right axis: a left knee is mirrored, a right one is as it is. Applied
        twice it gives the box back.

        Raises:
            ValueError: another side.
        """
        if side not in ("right", "left"):
            raise ValueError(f'side must be "right" or "left", got {side!r}')
        return self.mirrored(slices) if side == "left" else self

    @property
    def extents(self) -> tuple[int, int, int]:
        """Number of voxels along (slice, x, y)."""
        return self.slice_max - self.slice_min, self.x_max - self.x_min, self.y_max - self.y_min

    @property
    def volume(self) -> int:
        """Number of voxels covered."""
        return (self.slice_max - self.slice_min) * (self.x_max - self.x_min) * (self.y_max - self.y_min)

    def inside(self, shape: tuple[int, int, int]) -> bool:
        """Whether every covered voxel lies in a grid of `shape` = (slices, x, y)."""
        return (
            min(self.slice_min, self.x_min, self.y_min) >= 0
            and self.slice_max <= shape[0]
            and self.x_max <= shape[1]
            and self.y_max <= shape[2]
        )


def _integer(number: SupportsIndex) -> int:
    if type(number) is int:
        return number
    if not isinstance(number, bool):  # True is an index to Python, but no coordinate
        with suppress(TypeError):
            return operator.index(number)
    raise ValueError(f"the bounds of a box are integers, got {number!r}")


def _intersection(a: Box3D, b: Box3D) -> int:
    slices = min(a.slice_max, b.slice_max) - max(a.slice_min, b.slice_min)
    width = min(a.x_max, b.x_max) - max(a.x_min, b.x_min)
    height = min(a.y_max, b.y_max) - max(a.y_min, b.y_min)
    return slices * width * height if min(slices, width, height) > 0 else 0


def iou(a: Box3D, b: Box3D) -> float:
    """Intersection over union of two boxes, in [0, 1] (Jaccard index of the covered voxels)."""
    overlap = _intersection(a, b)
    return overlap / (a.volume + b.volume - overlap)


def giou(a: Box3D, b: Box3D) -> float:
    """Generalised IoU, in (-1, 1]: `IoU - |C \\ (A u B)| / |C|` with C the smallest box around both.

    Rezatofighi et al., CVPR 2019, algorithm 1, in three dimensions.
    """
    overlap = _intersection(a, b)
    union = a.volume + b.volume - overlap
    hull = (
        (max(a.slice_max, b.slice_max) - min(a.slice_min, b.slice_min))
        * (max(a.x_max, b.x_max) - min(a.x_min, b.x_min))
        * (max(a.y_max, b.y_max) - min(a.y_min, b.y_min))
    )
    return overlap / union - (hull - union) / hull


def center_distance_mm(a: Box3D, b: Box3D, spacing_mm: tuple[float, float, float]) -> float:
    """Euclidean distance of the two centres in mm; `spacing_mm` is the voxel size along (slice, x, y)."""
    ds, dx, dy = spacing_mm
    return (
        math.hypot(
            (a.slice_min + a.slice_max - b.slice_min - b.slice_max) * ds,
            (a.x_min + a.x_max - b.x_min - b.x_max) * dx,
            (a.y_min + a.y_max - b.y_min - b.y_max) * dy,
        )
        / 2
    )


def boxes_array(boxes: Sequence[Box3D]) -> npt.NDArray[np.int64]:
    """The boxes as rows (slice_min, slice_max, x_min, x_max, y_min, y_max), half-open; int64 [N, 6]."""
    return np.array([astuple(box) for box in boxes], dtype=np.int64).reshape(-1, 6)


def iou_array(a_N_6: IntArray, b_N_6: IntArray) -> FloatArray:
    """IoU of each pair of rows: half-open boxes [N, 6] and [N, 6] -> [N].

    Raises:
        ValueError: wrong shape or dtype, or a row with min >= max (the row is named).
    """
    return _iou_of_rows(*_checked_pairs(a_N_6, b_N_6))


def iou_matrix(a_N_6: IntArray, b_M_6: IntArray) -> FloatArray:
    """IoU of every box with every other: half-open boxes [N, 6] and [M, 6] -> [N, M].

    Raises:
        ValueError: wrong shape or dtype, or a row with min >= max (the row is named).
    """
    return _iou_of_rows(_checked(a_N_6)[:, None, :], _checked(b_M_6)[None, :, :])


def giou_array(a_N_6: IntArray, b_N_6: IntArray) -> FloatArray:
    """Generalised IoU of each pair of rows, as `giou`: half-open boxes [N, 6] and [N, 6] -> [N].

    Raises:
        ValueError: wrong shape or dtype, or a row with min >= max (the row is named).
    """
    return _giou_of_rows(*_checked_pairs(a_N_6, b_N_6))


def giou_matrix(a_N_6: IntArray, b_M_6: IntArray) -> FloatArray:
    """Generalised IoU of every box with every other: half-open boxes [N, 6] and [M, 6] -> [N, M].

    Raises:
        ValueError: wrong shape or dtype, or a row with min >= max (the row is named).
    """
    return _giou_of_rows(_checked(a_N_6)[:, None, :], _checked(b_M_6)[None, :, :])


def _checked_pairs(a_N_6: IntArray, b_N_6: IntArray) -> tuple[FloatArray, FloatArray]:
    a, b = _checked(a_N_6), _checked(b_N_6)
    if a.shape != b.shape:
        raise ValueError(f"pairs need as many boxes on both sides, got {len(a)} and {len(b)}")
    return a, b


def _checked(boxes_N_6: IntArray) -> FloatArray:
    boxes = np.asarray(boxes_N_6)
    if boxes.ndim != 2 or boxes.shape[1] != 6 or not np.issubdtype(boxes.dtype, np.integer):
        raise ValueError(f"boxes must be integers of shape [N, 6], got {boxes.dtype} {list(boxes.shape)}")
    bad = np.flatnonzero((boxes[:, 0::2] >= boxes[:, 1::2]).any(axis=1))
    if bad.size:
        raise ValueError(f"box {bad[0]} has an axis with min >= max: {boxes[bad[0]].tolist()}")
    # float64: a product of three extents may pass 2^63, and float64 is exact up to 2^53 voxels
    return boxes.astype(np.float64)


def _iou_of_rows(a: FloatArray, b: FloatArray) -> FloatArray:
    overlap, union = _overlap_and_union(a, b)
    ratio: FloatArray = overlap / union
    return ratio


def _giou_of_rows(a: FloatArray, b: FloatArray) -> FloatArray:
    overlap, union = _overlap_and_union(a, b)
    low, high = np.minimum(a[..., 0::2], b[..., 0::2]), np.maximum(a[..., 1::2], b[..., 1::2])
    hull = np.prod(high - low, axis=-1)
    value: FloatArray = overlap / union - (hull - union) / hull
    return value


def _overlap_and_union(a: FloatArray, b: FloatArray) -> tuple[FloatArray, FloatArray]:
    low = np.maximum(a[..., 0::2], b[..., 0::2])
    high = np.minimum(a[..., 1::2], b[..., 1::2])
    overlap = np.prod(np.maximum(high - low, 0), axis=-1)
    volume_a = np.prod(a[..., 1::2] - a[..., 0::2], axis=-1)
    volume_b = np.prod(b[..., 1::2] - b[..., 0::2], axis=-1)
    return overlap, volume_a + volume_b - overlap
