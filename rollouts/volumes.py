"""Volumes: reading NIfTI files, the view of them the model is shown, and which voxels a visual token covers.

Axes. A file has axes 0, 1, 2. The box convention says which of them is slice, x and y; frames are
[T, H, W] = [slice, y, x], so image rows run along y and columns along x. Nothing is flipped or reoriented:
boxes in text are in the file's own voxel grid, and so is the view.

The view is a true T x H x W grid (Qwen2.5-VL, arXiv 2502.13923: frames are patchified in pairs): every n-th slice of
the crop, resized in-plane. Token (t, h, w) therefore covers a box of voxels, `ViewGeometry.voxels_of_token`.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import nibabel
import numpy as np
import torch
from nibabel.affines import voxel_sizes
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError

from rewards.boxes import Box3D
from rewards.errors import ReasonKneeError


class VolumeError(ReasonKneeError, ValueError):
    """A volume that cannot be shown; the message names the file, what is wrong and the remedy."""


class ViewError(ReasonKneeError, ValueError):
    """A view that does not fit the volume or the model; the message names the setting and the remedy."""


class VolumeView(Protocol):
    """The fields of a view; `rl.config.VolumeViewConfig` has them."""

    crop: list[int]
    slice_stride: int
    height: int
    width: int
    window_low: float
    window_high: float
    seconds_per_mm: float


@dataclass(frozen=True)
class Volume:
    """A volume as stored."""

    path: Path
    array: np.ndarray
    """float32, the file's three axes in the file's order."""
    affine: np.ndarray
    """[4, 4], voxel indices to mm."""
    spacing_mm: tuple[float, float, float]
    """Voxel size along the file's three axes."""


@dataclass(frozen=True)
class PatchSizes:
    """How a vision tower cuts frames into tokens; the defaults are Qwen2.5-VL's."""

    patch: int = 14
    """Pixels along a patch's sides."""
    merge: int = 2
    """Patches along a token's sides."""
    temporal: int = 2
    """Frames in a patch."""

    @property
    def pixels_per_token(self) -> int:
        """Pixels along a token's sides."""
        return self.patch * self.merge


def require_file(path: str | Path) -> None:
    """Raises VolumeError when there is no such file."""
    if not Path(path).is_file():
        raise VolumeError(f"volume {path} does not exist; check data.root and the split CSV's image_filepath")


def read_volume(path: str | Path) -> Volume:
    """Read a NIfTI file.

    Raises:
        VolumeError: missing, unreadable or truncated file, not three axes, no voxels, no plain numbers, no voxel size,
            NaN or infinite values.
    """
    path = Path(path)
    require_file(path)
    with _named_errors(path):
        image = nibabel.load(path)
        shape = tuple(image.shape)
    # checked before the data is touched: a 4D series may be larger than memory
    if len(shape) != 3:
        raise VolumeError(f"volume {path} has {len(shape)} axes {shape}, expected 3; extract one 3D volume")
    kind = image.get_data_dtype()
    if kind.kind not in "iuf":
        raise VolumeError(f"volume {path} holds {kind} values; save it as plain integers or real numbers")
    if 0 in shape:
        raise VolumeError(f"volume {path} has no voxels: shape {shape}; export it again")
    with _named_errors(path):
        array = np.asarray(image.dataobj, dtype=np.float32)
    if not np.isfinite(array).all():
        bad = int(array.size - np.isfinite(array).sum())
        raise VolumeError(f"volume {path} has {bad} NaN or infinite voxels of {array.size}; export it again")
    spacing = tuple(float(size) for size in voxel_sizes(image.affine))
    if not all(np.isfinite(size) and size > 0 for size in spacing):
        raise VolumeError(f"volume {path} has voxel size {spacing} mm in its affine; repair the header")
    return Volume(path, array, np.asarray(image.affine), (spacing[0], spacing[1], spacing[2]))


@contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    """What nibabel raises on damaged headers and truncated or corrupted data, as a VolumeError."""
    try:
        yield
    except (ImageFileError, HeaderDataError, OSError, EOFError, ValueError, MemoryError, zlib.error) as error:
        raise VolumeError(
            f"volume {path} cannot be read as NIfTI ({error}); copy or download it again"
        ) from error


@dataclass(frozen=True)
class ViewGeometry:
    """Where each visual token of a view lies in the volume's voxel grid.

    Tokens are counted as the language model sees them: time slowest, then rows, then columns. They partition
    the crop: a voxel belongs to the token whose cell holds its centre, and slices skipped by the stride belong to the
    slice shown before them.
    """

    crop: Box3D
    """Voxels shown."""
    slice_stride: int
    height: int
    width: int
    sizes: PatchSizes

    @classmethod
    def of(cls, shape: tuple[int, int, int], view: VolumeView, sizes: PatchSizes) -> ViewGeometry:
        """Geometry of `view` on a volume of `shape` (slices, x, y).

        Raises:
            ViewError: the crop leaves the volume, the stride is not positive, height or width are no multiple of
                a token's side, or a token would be smaller than a voxel.
        """
        crop = _crop_box(view.crop, shape)
        if view.slice_stride < 1:
            raise ViewError(f"view.slice_stride is {view.slice_stride}, must be at least 1")
        side = sizes.pixels_per_token
        for name, pixels, voxels in (
            ("height", view.height, crop.y_max - crop.y_min),
            ("width", view.width, crop.x_max - crop.x_min),
        ):
            if pixels < side or pixels % side:
                nearest = max(side, round(pixels / side) * side)
                raise ViewError(
                    f"view.{name} is {pixels}, must be a multiple of {side} (patch {sizes.patch} x merge "
                    f"{sizes.merge}); nearest: {nearest}"
                )
            if pixels // side > voxels:
                raise ViewError(
                    f"view.{name} {pixels} makes {pixels // side} tokens of {voxels} voxels; use at most "
                    f"{voxels * side}"
                )
        return cls(crop, view.slice_stride, view.height, view.width, sizes)

    @property
    def slices(self) -> list[int]:
        """Slices shown, one per frame; the last one is repeated to fill the last temporal patch."""
        shown = list(range(self.crop.slice_min, self.crop.slice_max, self.slice_stride))
        return shown + shown[-1:] * (-len(shown) % self.sizes.temporal)

    @property
    def grid_thw(self) -> tuple[int, int, int]:
        """Patch grid before spatial merging (Qwen2.5-VL's `video_grid_thw`)."""
        patch = self.sizes.patch
        return len(self.slices) // self.sizes.temporal, self.height // patch, self.width // patch

    @property
    def token_grid(self) -> tuple[int, int, int]:
        """Visual tokens along time, rows and columns."""
        t, h, w = self.grid_thw
        return t, h // self.sizes.merge, w // self.sizes.merge

    @property
    def num_tokens(self) -> int:
        """Visual tokens of a volume."""
        t, h, w = self.token_grid
        return t * h * w

    def token_of_voxel(self, slice_: int, x: int, y: int) -> int:
        """Index of the token that covers a voxel.

        Raises:
            ValueError: the voxel is outside the crop.
        """
        crop, (_, rows, columns) = self.crop, self.token_grid
        inside = (
            crop.slice_min <= slice_ < crop.slice_max
            and crop.x_min <= x < crop.x_max
            and crop.y_min <= y < crop.y_max
        )
        if not inside:
            raise ValueError(f"voxel (slice {slice_}, x {x}, y {y}) is outside the view's {crop}")
        t = (slice_ - crop.slice_min) // (self.slice_stride * self.sizes.temporal)
        h = _cell_of(y - crop.y_min, crop.y_max - crop.y_min, rows)
        w = _cell_of(x - crop.x_min, crop.x_max - crop.x_min, columns)
        return (t * rows + h) * columns + w

    def voxels_of_token(self, index: int) -> Box3D:
        """The voxels a token covers, half-open.

        Raises:
            ValueError: there is no such token.
        """
        if not 0 <= index < self.num_tokens:
            raise ValueError(f"token {index} is outside the view's {self.num_tokens} tokens")
        crop, (_, rows, columns) = self.crop, self.token_grid
        t, h, w = index // (rows * columns), index // columns % rows, index % columns
        depth = self.slice_stride * self.sizes.temporal
        height, width = crop.y_max - crop.y_min, crop.x_max - crop.x_min
        return Box3D(
            crop.slice_min + t * depth,
            min(crop.slice_min + (t + 1) * depth, crop.slice_max),
            crop.x_min + _first_in_cell(w, width, columns),
            crop.x_min + _first_in_cell(w + 1, width, columns),
            crop.y_min + _first_in_cell(h, height, rows),
            crop.y_min + _first_in_cell(h + 1, height, rows),
        )


@dataclass(frozen=True)
class FramesView:
    """A volume as the vision tower sees it."""

    frames_T_H_W: torch.Tensor
    """uint8 grey values; T is a multiple of the temporal patch."""
    second_per_grid_t: float
    """`seconds_per_mm` times the distance in mm between two temporal patches."""
    geometry: ViewGeometry


def view_frames(
    volume: Volume,
    view: VolumeView,
    slice_axis: int = 2,
    x_axis: int = 0,
    y_axis: int = 1,
    sizes: PatchSizes | None = None,
    window: tuple[float, float] | None = None,
) -> FramesView:
    """The frames of a view: crop, every n-th slice, percentile window of the whole volume, in-plane resize.

    Args:
        slice_axis, x_axis, y_axis: file axes of slice, x and y; `sizes`: the tower's, default Qwen2.5-VL's.
        window: `intensity_window(volume, view)`, where many views of one volume are made.
    Raises:
        ViewError: the view does not fit the volume.
        VolumeError: every voxel has the same value.
    """
    axes = (slice_axis, x_axis, y_axis)
    if sorted(axes) != [0, 1, 2]:
        raise ViewError(f"axes slice={slice_axis}, x={x_axis}, y={y_axis} must be 0, 1 and 2, each once")
    slices, columns, rows = (volume.array.shape[axis] for axis in axes)
    geometry = ViewGeometry.of((slices, columns, rows), view, sizes or PatchSizes())
    crop = geometry.crop
    shown = volume.array.transpose(slice_axis, y_axis, x_axis)[
        geometry.slices, crop.y_min : crop.y_max, crop.x_min : crop.x_max
    ]
    low, high = window or intensity_window(volume, view)
    frames = torch.from_numpy(np.ascontiguousarray(shown)).sub_(low).div_(high - low).clamp_(0.0, 1.0)
    if frames.shape[1:] != (view.height, view.width):
        # antialiasing, so that thin cartilage is averaged rather than skipped when frames shrink
        frames = torch.nn.functional.interpolate(
            frames[:, None], (view.height, view.width), mode="bilinear", align_corners=False, antialias=True
        )[:, 0]
    step_mm = volume.spacing_mm[slice_axis] * view.slice_stride * geometry.sizes.temporal
    return FramesView(frames.mul_(255.0).round_().to(torch.uint8), view.seconds_per_mm * step_mm, geometry)


def intensity_window(volume: Volume, view: VolumeView) -> tuple[float, float]:
    """Intensities that become black and white: percentiles of the whole volume, whatever part of it is shown."""
    if not 0 <= view.window_low < view.window_high <= 100:
        raise ViewError(
            f"view.window_low {view.window_low} and view.window_high {view.window_high} must be percentiles, "
            "the first below the second"
        )
    low, high = np.percentile(volume.array, (view.window_low, view.window_high))
    if low == high:  # nearly all voxels are background: fall back on the whole range
        low, high = volume.array.min(), volume.array.max()
    if low == high:
        raise VolumeError(f"volume {volume.path} is blank: every voxel is {float(low)}; export it again")
    return float(low), float(high)


def _crop_box(crop: Sequence[int], shape: tuple[int, int, int]) -> Box3D:
    if not crop:
        return Box3D(0, shape[0], 0, shape[1], 0, shape[2])
    if len(crop) != 6:
        raise ViewError(f"view.crop has {len(crop)} numbers, needs 6: start_slice, end_slice, x, x, y, y")
    try:
        box = Box3D(*crop)
    except ValueError as error:
        raise ViewError(f"view.crop {list(crop)} is empty: {error}") from error
    lows, highs = (box.slice_min, box.x_min, box.y_min), (box.slice_max, box.x_max, box.y_max)
    if min(lows) < 0 or any(high > size for high, size in zip(highs, shape, strict=True)):
        raise ViewError(f"view.crop {list(crop)} leaves the volume of (slices, x, y) = {shape}; shrink it")
    return box


# A line of `voxels` is cut into `cells` of equal real length. Integer arithmetic: at 384 voxels and 14 cells
# floats would put boundary voxels on either side.


def _cell_of(voxel: int, voxels: int, cells: int) -> int:
    """Cell that holds the voxel's centre, floor((voxel + 1/2) * cells / voxels)."""
    return (2 * voxel + 1) * cells // (2 * voxels)


def _first_in_cell(cell: int, voxels: int, cells: int) -> int:
    """First voxel whose centre is in the cell, ceil(cell * voxels / cells - 1/2)."""
    return -((cells - 2 * cell * voxels) // (2 * cells))
