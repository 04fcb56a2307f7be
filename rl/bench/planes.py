"""A volume in three planes with boxes on it, as a radiologist would hang it.

Superior and anterior are up; on sagittal planes anterior is left, on the others the patient's right is left.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field

import nibabel
import numpy as np
from matplotlib.image import imsave

from rewards.boxes import Box3D
from rollouts.volumes import VolumeError, read_volume

_PLANE_NAMES = {"L": "Sagittal", "R": "Sagittal", "A": "Coronal", "P": "Coronal", "S": "Axial", "I": "Axial"}
"""By the direction across the plane."""
_VERTICAL_RANK = {"S": 0, "I": 0, "A": 1, "P": 1, "R": 2, "L": 2}
"""Of the two directions in a plane the one of lower rank is vertical."""
_REVERSED = frozenset("SRA")
"""Directions in which an index rises against the display, whose rows run down and whose columns run right."""


@dataclass(frozen=True)
class BoxVolume:
    """A volume in the order of a box: `array` is [slice, x, y]."""

    array: np.ndarray
    spacing_mm: tuple[float, float, float]
    codes: tuple[str, str, str]
    """Anatomical direction (one of R L A P S I) in which each index rises."""


@dataclass(frozen=True, slots=True)
class Outline:
    """A box as it appears on a plane, in mm from the plane's top left corner."""

    who: str
    left: float
    top: float
    width: float
    height: float
    cut: bool
    """Whether the plane passes through the box; otherwise the outline is its projection."""


@dataclass(frozen=True, slots=True)
class Plane:
    """One slice of a volume with boxes on it."""

    title: str
    grey: np.ndarray = field(compare=False)
    """uint8 [rows, columns], as displayed."""
    width_mm: float
    height_mm: float
    outlines: tuple[Outline, ...]

    @property
    def png(self) -> str:
        """The slice as a data URI."""
        buffer = io.BytesIO()
        imsave(buffer, self.grey, cmap="gray", vmin=0, vmax=255, format="png")
        return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def load_volume(path: str, axes: Sequence[int]) -> BoxVolume:
    """Read a NIfTI file into the order of boxes.

    Args:
        path: the file.
        axes: file axis of slice, x and y (`rl.data.boxes.Convention.axes`).

    Raises:
        VolumeError: the file is missing, damaged or not 3D, or its affine has no orientation.
    """
    volume = read_volume(path)
    codes = nibabel.aff2axcodes(volume.affine)
    if None in codes:
        raise VolumeError(f"volume {path} has an affine without orientation ({codes}); repair the header")
    s, x, y = axes
    return BoxVolume(
        array=np.transpose(volume.array, (s, x, y)),
        spacing_mm=(volume.spacing_mm[s], volume.spacing_mm[x], volume.spacing_mm[y]),
        codes=(codes[s], codes[x], codes[y]),
    )


def draw_planes(volume: BoxVolume, boxes: Mapping[str, Box3D | None]) -> tuple[Plane, ...]:
    """The three planes through the centre of the first box there is, or of the volume.

    Args:
        volume: the volume.
        boxes: who -> box; the order decides which centre is taken.
    """
    present = {who: box for who, box in boxes.items() if box is not None}
    shape = volume.array.shape
    centre = [n // 2 for n in shape]
    if present:
        edges = astuple(next(iter(present.values())))
        # a box that leaves the volume is shown from the nearest slice
        centre = [min(max((edges[2 * i] + edges[2 * i + 1] - 1) // 2, 0), shape[i] - 1) for i in range(3)]
    window = np.percentile(volume.array, [1, 99.5])
    planes = [_draw_plane(volume, present, normal, centre[normal], window) for normal in range(3)]
    return tuple(
        sorted(planes, key=lambda plane: ("Sagittal", "Coronal", "Axial").index(plane.title.split()[0]))
    )


def _draw_plane(
    volume: BoxVolume, boxes: Mapping[str, Box3D], normal: int, index: int, window: np.ndarray
) -> Plane:
    vertical, horizontal = sorted(
        (axis for axis in range(3) if axis != normal), key=lambda axis: _VERTICAL_RANK[volume.codes[axis]]
    )
    image = np.take(volume.array, index, axis=normal)
    if vertical > horizontal:
        image = image.T
    image = image[:: _step(volume, vertical), :: _step(volume, horizontal)]
    low, high = window
    grey = np.clip((image - low) / max(high - low, 1e-6), 0, 1)
    outlines = [
        _outline(volume, who, box, (vertical, horizontal), (normal, index)) for who, box in boxes.items()
    ]
    return Plane(
        title=f"{_PLANE_NAMES[volume.codes[normal]]} {('slice', 'x', 'y')[normal]} = {index}",
        grey=(grey * 255).astype(np.uint8),
        width_mm=round(volume.array.shape[horizontal] * volume.spacing_mm[horizontal], 2),
        height_mm=round(volume.array.shape[vertical] * volume.spacing_mm[vertical], 2),
        outlines=tuple(outlines),
    )


def _outline(
    volume: BoxVolume, who: str, box: Box3D, in_plane: tuple[int, int], plane: tuple[int, int]
) -> Outline:
    edges = astuple(box)
    (top, height), (left, width) = (
        _extent(volume, axis, edges[2 * axis], edges[2 * axis + 1]) for axis in in_plane
    )
    normal, index = plane
    return Outline(who, left, top, width, height, edges[2 * normal] <= index < edges[2 * normal + 1])


def _extent(volume: BoxVolume, axis: int, low: int, high: int) -> tuple[float, float]:
    """Start and length in mm on the display of voxels low to high (half-open)."""
    start = volume.array.shape[axis] - high if volume.codes[axis] in _REVERSED else low
    return round(start * volume.spacing_mm[axis], 2), round((high - low) * volume.spacing_mm[axis], 2)


def _step(volume: BoxVolume, axis: int) -> int:
    return -1 if volume.codes[axis] in _REVERSED else 1
