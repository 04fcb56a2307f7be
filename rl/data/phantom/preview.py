"""A picture of a volume that a person can judge."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure


def save_preview(path_png: Path, image: np.ndarray, spacing_mm: Sequence[float]) -> None:
    """Montage of all sagittal slices plus the middle coronal and axial plane.

    Args:
        image: [X, Y, S] in file axes.
        spacing_mm: voxel size along them.
    """
    shown = np.linspace(0, image.shape[2] - 1, min(16, image.shape[2])).round().astype(int)
    columns = 6
    rows = -(-(len(shown) + 2) // columns)
    figure = Figure(figsize=(columns * 2.4, rows * 2.4), facecolor="black")
    axes = figure.subplots(rows, columns).ravel()
    x_mm, y_mm, slice_mm = spacing_mm
    middle_x, middle_y = image.shape[0] // 2, int(image.shape[1] * 0.52)
    planes = [
        *((image[:, :, k].T, f"slice {k}", y_mm / x_mm) for k in shown),
        (image[middle_x], "coronal", y_mm / slice_mm),
        (image[:, middle_y], "axial", x_mm / slice_mm),
    ]
    top = float(np.percentile(image, 99.7))
    for axis, (plane, title, aspect) in zip(axes, planes, strict=False):
        axis.imshow(plane, cmap="gray", vmin=0, vmax=top, interpolation="bilinear", aspect=aspect)
        axis.set_title(title, color="white", fontsize=7, pad=2)
    for axis in axes:
        axis.axis("off")
    figure.subplots_adjust(0, 0, 1, 0.98, 0.02, 0.08)
    figure.savefig(path_png, dpi=110)
