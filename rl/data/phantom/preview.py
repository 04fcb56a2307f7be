"""A picture of a volume that a person can judge."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from rewards.boxes import Box3D


def save_preview(
    path_png: Path,
    image: np.ndarray,
    spacing_mm: Sequence[float],
    labels: np.ndarray | None = None,
    boxes: Sequence[Box3D] = (),
) -> None:
    """Montage of all sagittal slices plus the middle coronal and axial plane.

    Args:
        image: [X, Y, S] in file axes.
        spacing_mm: voxel size along them.
        labels: uint8 [X, Y, S] drawn as a tint, or None.
        boxes: drawn on the slices they cover.
    """
    shown = np.linspace(0, image.shape[2] - 1, min(16, image.shape[2])).round().astype(int)
    columns = 6
    rows = -(-(len(shown) + 2) // columns)
    figure = Figure(figsize=(columns * 2.4, rows * 2.4), facecolor="black")
    axes = figure.subplots(rows, columns).ravel()
    x_mm, y_mm, slice_mm = spacing_mm
    planes = [
        (image[:, :, k], None if labels is None else labels[:, :, k], f"slice {k}", y_mm / x_mm)
        for k in shown
    ]
    middle_x, middle_y = image.shape[0] // 2, int(image.shape[1] * 0.52)
    planes += [
        (image[middle_x].T, None if labels is None else labels[middle_x].T, "coronal", y_mm / slice_mm),
        (image[:, middle_y].T, None if labels is None else labels[:, middle_y].T, "axial", x_mm / slice_mm),
    ]
    top = float(np.percentile(image, 99.7))
    for axis, (plane, tint, title, aspect) in zip(axes, planes, strict=False):
        axis.imshow(plane.T, cmap="gray", vmin=0, vmax=top, interpolation="bilinear", aspect=aspect)
        if tint is not None:
            axis.imshow(
                np.ma.masked_equal(tint.T, 0),
                cmap="nipy_spectral",
                vmin=0,
                vmax=64,
                alpha=0.35,
                aspect=aspect,
                interpolation="nearest",
            )
        axis.set_title(title, color="white", fontsize=7, pad=2)
    for axis, k in zip(axes, shown, strict=False):
        for box in boxes:
            if box.slice_min <= k < box.slice_max:
                axis.add_patch(
                    Rectangle(
                        (box.x_min - 0.5, box.y_min - 0.5),
                        box.x_max - box.x_min,
                        box.y_max - box.y_min,
                        fill=False,
                        edgecolor="lime",
                        linewidth=0.8,
                    )
                )
    for axis in axes:
        axis.axis("off")
    figure.subplots_adjust(0, 0, 1, 0.98, 0.02, 0.08)
    figure.savefig(path_png, dpi=110)
