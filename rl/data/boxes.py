"""How the dataset's boxes relate to the axes of a volume file: the one place that knows the convention.

A box in the dataset's text is six integers, a pair for each of slice, x, y. Which file axis each pair runs
along, in which direction, and whether its end is included is `data.box_convention`. A `Box3D` is always
half-open and always in the file's own voxel order, with its axes *named* slice, x, y by the convention.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import cc3d
import numpy as np
from scipy import ndimage

from rewards.boxes import Box3D
from rl.config import BoxConvention, ConfigError

AXIS_NAMES = ("slice", "x", "y")
Shape = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Convention:
    """A parsed `BoxConvention`; every triple is in the order slice, x, y."""

    axes: tuple[int, int, int]
    """File axis (0, 1, 2) of each."""
    flip: tuple[bool, bool, bool]
    """Whether the text counts from the far end of that axis."""
    inclusive: bool
    """Whether the second number of a pair is the last voxel, rather than one past it."""

    def grid(self, file_shape: Sequence[int]) -> Shape:
        """A file's shape in the order (slice, x, y)."""
        s, x, y = (int(file_shape[axis]) for axis in self.axes)
        return s, x, y

    def describe(self) -> str:
        """As written in the config: `axes=slice=2,x=0,y=1 flip=none end=inclusive`."""
        axes = ",".join(f"{name}={axis}" for name, axis in zip(AXIS_NAMES, self.axes, strict=True))
        flip = ",".join(name for name, flipped in zip(AXIS_NAMES, self.flip, strict=True) if flipped)
        return f"axes={axes} flip={flip or 'none'} end={'inclusive' if self.inclusive else 'exclusive'}"


def parse_convention(config: BoxConvention) -> Convention:
    """Read `data.box_convention`.

    Raises:
        ConfigError: a field that is not of the documented form; the message names field, value and form.
    """
    found = re.fullmatch(r"slice=([012]),x=([012]),y=([012])", config.axes.replace(" ", ""))
    axes = tuple(int(a) for a in found.groups()) if found else ()
    if len(set(axes)) != 3:
        raise ConfigError(
            f"data.box_convention.axes is {config.axes!r}; write each of slice, x, y with its own file axis, "
            'e.g. "slice=2,x=0,y=1"'
        )
    flipped = [name.strip() for name in config.flip.split(",") if name.strip()]
    if any(name not in AXIS_NAMES for name in flipped) or len(set(flipped)) != len(flipped):
        raise ConfigError(
            f'data.box_convention.flip is {config.flip!r}; list any of slice, x, y once, e.g. "x,y", or leave it empty'
        )
    if config.end not in ("inclusive", "exclusive"):
        raise ConfigError(f'data.box_convention.end is {config.end!r}; write "inclusive" or "exclusive"')
    s, x, y = axes
    return Convention(
        (s, x, y), ("slice" in flipped, "x" in flipped, "y" in flipped), config.end == "inclusive"
    )


def box_from_text(numbers: Sequence[int], shape: Shape, convention: Convention) -> Box3D:
    """The file-grid box that six numbers of the dataset's text mean.

    Args:
        numbers: `[start_slice, end_slice, x_min, x_max, y_min, y_max]` as written.
        shape: the file's grid as (slices, x, y).
        convention: what the numbers mean.

    Raises:
        ValueError: not six numbers, an empty or inverted pair, or one outside the grid; never repaired.
    """
    if len(numbers) != 6:
        raise ValueError(f"a box has six numbers, got {list(numbers)}")
    limits: list[int] = []
    for axis, name in enumerate(AXIS_NAMES):
        low, high = numbers[2 * axis], numbers[2 * axis + 1] + int(convention.inclusive)
        if not 0 <= low < high <= shape[axis]:
            raise ValueError(
                f"box {list(numbers)}: {name} runs from {numbers[2 * axis]} to {numbers[2 * axis + 1]} "
                f"({'inclusive' if convention.inclusive else 'exclusive'} end), outside the {shape[axis]} voxels "
                "of that axis or empty"
            )
        limits += [shape[axis] - high, shape[axis] - low] if convention.flip[axis] else [low, high]
    return Box3D(*limits)


def box_to_text(box: Box3D, shape: Shape, convention: Convention) -> list[int]:
    """The six numbers by which the dataset writes a file-grid box; the inverse of `box_from_text`."""
    numbers: list[int] = []
    for axis, name in enumerate(AXIS_NAMES):
        low, high = getattr(box, f"{name}_min"), getattr(box, f"{name}_max")
        if convention.flip[axis]:
            low, high = shape[axis] - high, shape[axis] - low
        numbers += [low, high - int(convention.inclusive)]
    return numbers


Extent = tuple[slice, slice, slice]
"""Bounding box along the file's own axes."""


def region_extents(mask: np.ndarray, regions: Mapping[int, Collection[int]]) -> dict[int, Extent]:
    """Extent of the largest 26-connected component of each region; a region without voxels is left out.

    Args:
        mask: integer labels in file order, 0 for background.
        regions: key (a question id, say) -> labels whose union is the region.

    Of two equally large components the one met first in file order counts, so that the result does not
    depend on the machine.
    """
    # One pass finds the extent of every label; the rest works on crops, which makes a full-size mask cheap.
    extents = ndimage.find_objects(mask)
    found: dict[int, Extent] = {}
    for key, labels in regions.items():
        parts = [extents[label - 1] for label in labels if 0 < label <= len(extents) and extents[label - 1]]
        if parts:
            outer = _union(parts)
            inner = _largest_component(np.isin(mask[outer], list(labels)))
            found[key] = _shift(inner, outer)
    return found


def mask_box(mask: np.ndarray, label_ids: Collection[int], convention: Convention) -> Box3D | None:
    """File-grid box of the largest connected component of a region (the paper's boxes, section 3.2).

    Only the convention's axis names matter here: a mask has no text to flip. None when the region is absent.
    """
    extent = region_extents(mask, {0: label_ids}).get(0)
    return None if extent is None else extent_box(extent, convention)


def extent_box(extent: Extent, convention: Convention) -> Box3D:
    """A file-order extent as a box whose axes carry the convention's names."""
    s, x, y = (extent[axis] for axis in convention.axes)
    return Box3D(s.start, s.stop, x.start, x.stop, y.start, y.stop)


def _largest_component(region: np.ndarray) -> Extent:
    components = cc3d.connected_components(np.ascontiguousarray(region), connectivity=26).ravel()
    sizes = np.bincount(components)
    sizes[0] = 0
    first = components[np.argmax((sizes == sizes.max())[components])]
    extent: Extent = ndimage.find_objects((components == first).reshape(region.shape).astype(np.uint8))[0]
    return extent


def _union(parts: Sequence[Extent]) -> Extent:
    a, b, c = (slice(min(p[i].start for p in parts), max(p[i].stop for p in parts)) for i in range(3))
    return a, b, c


def _shift(inner: Extent, outer: Extent) -> Extent:
    a, b, c = (slice(o.start + i.start, o.start + i.stop) for o, i in zip(outer, inner, strict=True))
    return a, b, c
