"""NIfTI headers for the reader, and the full inspection of a volume and its mask for `data check`.

Errors are `DataError`s that name the file; `place` (CSV file and line) says which row asked for it.
"""

from __future__ import annotations

import gzip
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError

from rl.data.layout import DataError, Fault

READ_ERRORS = (OSError, EOFError, ValueError, MemoryError, zlib.error, ImageFileError)
"""What nibabel and gzip raise on damaged files; a header may ask for more memory than there is."""


@dataclass(frozen=True, slots=True)
class Header:
    """What the reader needs of a volume; both triples along the file's axes."""

    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]


def read_header(path: Path, place: str) -> Header:
    """Shape and spacing of a volume, without reading its voxels.

    Raises:
        DataError: missing, unreadable, not 3D, no plain numbers, an affine that is not finite, or a spacing that is not
            positive and finite.
    """
    return _header(_open(path, place, Fault.MISSING_VOLUME, Fault.UNREADABLE_VOLUME), path, place)


@dataclass(frozen=True, slots=True)
class Inspection:
    """What a look at a volume and its mask has shown."""

    faults: list[DataError]
    header: Header | None
    """None when the volume cannot be used."""
    mask: np.ndarray | None
    """Labels in file order, when they were read and volume and mask are sound and on one grid."""


def inspect_volume(image_path: Path, mask_path: Path | None, place: str, *, whole: bool) -> Inspection:
    """Look at a volume and its mask, at every voxel (`whole`) or the headers, and collect what is wrong with them."""
    faults: list[DataError] = []
    header: Header | None = None
    mask: np.ndarray | None = None
    image: Any = None
    try:
        opened = _open(image_path, place, Fault.MISSING_VOLUME, Fault.UNREADABLE_VOLUME)
        sound, image = _header(opened, image_path, place), opened
        if whole:
            _check_voxels(_voxels(image, image_path, place, Fault.UNREADABLE_VOLUME), image_path, place)
        header = sound
    except DataError as error:
        faults.append(error)
    try:
        if mask_path is not None:
            opened = _open_mask(mask_path, image, image_path, place)
            mask = _voxels(opened, mask_path, place, Fault.UNREADABLE_MASK) if whole else None
    except DataError as error:
        faults.append(error)
    return Inspection(faults, header, mask if header is not None else None)


def read_mask(path: Path, image_path: Path, place: str) -> np.ndarray:
    """Labels of a mask in file order, uint8.

    Raises:
        DataError: missing, unreadable, not uint8, or not on the image's grid.
    """
    image = _open(image_path, place, Fault.MISSING_VOLUME, Fault.UNREADABLE_VOLUME)
    mask = _open_mask(path, image, image_path, place)
    return _voxels(mask, path, place, Fault.UNREADABLE_MASK)


def _open_mask(path: Path, image: Any, image_path: Path, place: str) -> Any:
    mask = _open(path, place, Fault.MISSING_MASK, Fault.UNREADABLE_MASK)
    _check_mask_header(mask, path, image, image_path, place)
    return mask


def _check_voxels(voxels: np.ndarray, path: Path, place: str) -> None:
    bad = voxels.size - int(np.isfinite(voxels).sum())
    if bad:
        raise DataError(
            Fault.UNREADABLE_VOLUME,
            f"{place}: {path} holds {bad} voxels that are NaN or infinite; convert the volume again",
        )
    if voxels.min() == voxels.max():
        raise DataError(
            Fault.UNREADABLE_VOLUME,
            f"{place}: {path} is blank, every voxel is {voxels.flat[0]}; convert the volume again",
        )


def _open(path: Path, place: str, missing: Fault, unreadable: Fault) -> Any:
    if not path.is_file():
        raise DataError(
            missing,
            f"{place}: {path} does not exist; place the file there or remove the row (nothing is replaced)",
        )
    try:
        return nib.load(path)
    except READ_ERRORS as error:
        raise DataError(unreadable, f"{place}: {path} is not a readable NIfTI file ({error})") from error


def _voxels(image: Any, path: Path, place: str, unreadable: Fault) -> np.ndarray:
    try:
        if path.suffix == ".gz":
            # nibabel stops before gzip's checksum, so a flipped bit would pass: read to the end of the stream.
            image = type(image).from_bytes(gzip.decompress(path.read_bytes()))
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
    if image.get_data_dtype().kind not in "iuf":
        raise DataError(
            Fault.UNREADABLE_VOLUME,
            f"{place}: {path} holds {image.get_data_dtype()} values; voxels must be plain integers or real numbers",
        )
    if not np.isfinite(image.affine).all():
        raise DataError(
            Fault.UNREADABLE_VOLUME,
            f"{place}: {path} has NaN or infinite numbers in its affine; repair the header",
        )
    spacing = tuple(float(z) for z in image.header.get_zooms()[:3])
    if not all(np.isfinite(z) and z > 0 for z in spacing):
        raise DataError(
            Fault.UNREADABLE_VOLUME, f"{place}: {path} has voxel size {spacing} mm; it must be positive"
        )
    return Header((shape[0], shape[1], shape[2]), (spacing[0], spacing[1], spacing[2]))


def _check_mask_header(mask: Any, path: Path, image: Any, image_path: Path, place: str) -> None:
    kind = mask.get_data_dtype()
    if kind != np.uint8 or (mask.dataobj.slope, mask.dataobj.inter) != (1, 0):
        raise DataError(
            Fault.MASK_MISMATCH,
            f"{place}: mask {path} is stored as {kind} with scale {mask.dataobj.slope:g}; labels must be plain uint8, "
            "save it as such",
        )
    if image is None:
        return
    if mask.shape != image.shape:
        raise DataError(
            Fault.MASK_MISMATCH,
            f"{place}: mask {path} has shape {mask.shape}, its image {image_path} {image.shape}",
        )
    if not np.allclose(mask.affine, image.affine, rtol=1e-4, atol=1e-2):
        raise DataError(
            Fault.MASK_MISMATCH,
            f"{place}: mask {path} has another affine than its image {image_path}: they lie in different places "
            f"(origins {np.round(mask.affine[:3, 3], 2).tolist()} and {np.round(image.affine[:3, 3], 2).tolist()} mm)",
        )
