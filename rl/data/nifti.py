"""NIfTI headers for the reader, and the full inspection of a volume and its mask for `data check`.

Errors are `DataError`s that name the file; `place` (CSV file and line) says which row asked for it.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from rl.data.layout import DataError, Fault

READ_ERRORS = (OSError, EOFError, ValueError, zlib.error, nib.filebasedimages.ImageFileError)
"""What nibabel and gzip raise on damaged files."""


@dataclass(frozen=True, slots=True)
class Header:
    """What the reader needs of a volume; both triples along the file's axes."""

    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]


def read_header(path: Path, place: str) -> Header:
    """Shape and spacing of a volume, without reading its voxels.

    Raises:
        DataError: missing, unreadable, not 3D, or a spacing that is not positive and finite.
    """
    return _header(_open(path, place, Fault.MISSING_VOLUME, Fault.UNREADABLE_VOLUME), path, place)


def inspect_volume(image_path: Path, mask_path: Path | None, place: str) -> tuple[list[DataError], np.ndarray | None]:
    """Read a volume and its mask whole: every fault found, and the mask when it can be trusted.

    Returns:
        The faults, and the mask (file order, uint8) if it is readable and on the image's grid.
    """
    faults: list[DataError] = []
    image = None
    try:
        image = _open(image_path, place, Fault.MISSING_VOLUME, Fault.UNREADABLE_VOLUME)
        _header(image, image_path, place)
        voxels = _voxels(image, image_path, place, Fault.UNREADABLE_VOLUME)
        if not np.isfinite(voxels).all():
            count = int(voxels.size - np.isfinite(voxels).sum())
            raise DataError(
                Fault.UNREADABLE_VOLUME,
                f"{place}: {image_path} holds {count} voxels that are NaN or infinite; convert the volume again",
            )
    except DataError as error:
        faults.append(error)
    if mask_path is None:
        return faults, None
    try:
        mask = _open(mask_path, place, Fault.MISSING_MASK, Fault.UNREADABLE_MASK)
        _check_mask_header(mask, mask_path, image, image_path, place)
        labels = _voxels(mask, mask_path, place, Fault.UNREADABLE_MASK)
    except DataError as error:
        return [*faults, error], None
    return faults, labels


def read_mask(path: Path, shape: tuple[int, ...], place: str) -> np.ndarray:
    """Labels of a mask in file order, uint8.

    Raises:
        DataError: missing, unreadable, not uint8, or not of the image's shape.
    """
    mask = _open(path, place, Fault.MISSING_MASK, Fault.UNREADABLE_MASK)
    if tuple(mask.shape) != shape:
        raise DataError(Fault.MASK_MISMATCH, f"{place}: mask {path} has shape {mask.shape}, its image {shape}")
    _check_uint8(mask, path, place)
    return _voxels(mask, path, place, Fault.UNREADABLE_MASK)


def _open(path: Path, place: str, missing: Fault, unreadable: Fault) -> Any:
    if not path.is_file():
        raise DataError(
            missing, f"{place}: {path} does not exist; place the file there or remove the row (nothing is replaced)"
        )
    try:
        return nib.load(path)
    except READ_ERRORS as error:
        raise DataError(unreadable, f"{place}: {path} is not a readable NIfTI file ({error})") from error


def _voxels(image: Any, path: Path, place: str, unreadable: Fault) -> np.ndarray:
    try:
        return np.asanyarray(image.dataobj)
    except READ_ERRORS as error:
        raise DataError(
            unreadable, f"{place}: {path} is truncated or damaged ({error}); copy or download it again"
        ) from error


def _header(image: Any, path: Path, place: str) -> Header:
    shape = tuple(int(n) for n in image.shape)
    if len(shape) != 3 or min(shape) < 1:
        raise DataError(
            Fault.UNREADABLE_VOLUME,
            f"{place}: {path} is {len(shape)}D with shape {shape}; one 3D volume per file is needed",
        )
    spacing = tuple(float(z) for z in image.header.get_zooms()[:3])
    if not all(np.isfinite(z) and z > 0 for z in spacing):
        raise DataError(Fault.UNREADABLE_VOLUME, f"{place}: {path} has voxel size {spacing} mm; it must be positive")
    return Header((shape[0], shape[1], shape[2]), (spacing[0], spacing[1], spacing[2]))


def _check_uint8(mask: Any, path: Path, place: str) -> None:
    kind = mask.get_data_dtype()
    if kind != np.uint8:
        raise DataError(
            Fault.MASK_MISMATCH, f"{place}: mask {path} is stored as {kind}; labels must be uint8, save it as such"
        )


def _check_mask_header(mask: Any, path: Path, image: Any, image_path: Path, place: str) -> None:
    _check_uint8(mask, path, place)
    if image is None:
        return
    if mask.shape != image.shape:
        raise DataError(
            Fault.MASK_MISMATCH, f"{place}: mask {path} has shape {mask.shape}, its image {image_path} {image.shape}"
        )
    if not np.allclose(mask.affine, image.affine, rtol=1e-4, atol=1e-2):
        raise DataError(
            Fault.MASK_MISMATCH,
            f"{place}: mask {path} has another affine than its image {image_path}: they lie in different places "
            f"(origins {np.round(mask.affine[:3, 3], 2).tolist()} and {np.round(image.affine[:3, 3], 2).tolist()} mm)",
        )
