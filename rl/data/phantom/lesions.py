"""Where lesions lie: shares, numbers and depths by grade, as masks over the voxels of a region.

Every function takes the knee coordinates of a region's voxels (flat arrays of length N) and returns masks of length N.
Shares are drawn well inside the grade's interval, so that they can be read back from the masks.
"""

from __future__ import annotations

import numpy as np

BML_SIZE = {1: (0.18, 0.29), 2: (0.42, 0.58), 3: (0.72, 0.85)}
"""Share of the subregion that is lesion, cyst included (MOAKS: under 33, 33-66, over 66 %)."""
BML_SHARE = {1: (0.10, 0.25), 2: (0.42, 0.58), 3: (0.80, 1.0)}
"""Share of the lesion that is not cyst (MOAKS: under 33, 33-66, over 66 %)."""
CARTILAGE_SIZE = {1: (0.07, 0.095), 2: (0.38, 0.60), 3: (0.82, 0.96)}
"""Share of the surface that is altered (MOAKS: under 10, 10-75, over 75 %)."""
CARTILAGE_DEPTH = {1: (0.06, 0.095), 2: (0.35, 0.55), 3: (0.84, 1.0)}
"""Share of the defect that is full thickness (MOAKS: under 10, 10-75, over 75 %)."""
BLOB_GAP_MM = {1: 3.0, 2: 3.0, 3: 2.2}
"""Marrow left between two separate lesions, by size: over 1.1 pixels, so that neighbours never touch."""


def bone_marrow_lesion(
    a: np.ndarray,
    s: np.ndarray,
    side: np.ndarray,
    size: int,
    number: int,
    share: int,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Masks of the lesion (cyst included) and of its cyst, each [N].

    The subregion is cut across its longer in-plane axis into `number` bands of equal volume with a gap between; in each
    band the lesion is the ellipsoid around a random centre that holds its part of the volume, the cyst its core.
    """
    along = a if np.ptp(a) > np.ptp(s) else s
    cuts = np.quantile(along, np.linspace(0, 1, number + 1))
    target = rng.uniform(*BML_SIZE[size]) * a.size / number
    cystic = 1 - rng.uniform(*BML_SHARE[share])
    gap = BLOB_GAP_MM[size]
    lesion, cyst = np.zeros(a.size, bool), np.zeros(a.size, bool)
    for i in range(number):
        low = cuts[i] + (gap / 2 if i else -1)
        high = cuts[i + 1] - (gap / 2 if i + 1 < number else -1)
        band = np.flatnonzero((along > low) & (along < high))
        score = sum((_centred(axis[band], rng)) ** 2 for axis in (a, s, side))
        order = band[np.argsort(score, kind="stable")]
        count = max(1, min(round(target), order.size))
        lesion[order[:count]] = True
        cyst[order[: round(cystic * count)]] = True
    return lesion, cyst


def _centred(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Coordinates relative to a random centre near the middle, in units of the extent."""
    low, high = float(values.min()), float(values.max())
    return (values - (low + high) / 2 - rng.uniform(-0.15, 0.15) * (high - low)) / (high - low + 1e-3)


def cartilage_lesion(
    along: np.ndarray, side: np.ndarray, size: int, depth: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Masks of the defect and of its full-thickness part, each [N].

    Args:
        along: coordinate along the articular surface in the sagittal plane, mm.
        side: coordinate across slices, mm. Both are constant through the cartilage's thickness, so shares of
            voxels are shares of surface.
    """
    if size == 1:  # a focal defect: about one slice pair wide
        u = (along - along.mean() - rng.uniform(-0.25, 0.25) * np.ptp(along)) / 5.0
        v = (side - side.mean() - rng.uniform(-0.25, 0.25) * np.ptp(side)) / 7.0
    else:
        u, v = _centred(along, rng), _centred(side, rng)
    order = np.argsort(u**2 + v**2, kind="stable")
    count = max(1, round(rng.uniform(*CARTILAGE_SIZE[size]) * order.size))
    defect, full = np.zeros(order.size, bool), np.zeros(order.size, bool)
    defect[order[:count]] = True
    if depth:
        full[order[: max(1, round(rng.uniform(*CARTILAGE_DEPTH[depth]) * count))]] = True
    return defect, full


def patches(
    a: np.ndarray, s: np.ndarray, side: np.ndarray, share: float, rng: np.random.Generator
) -> np.ndarray:
    """Mask [N] of irregular patches that cover a share of the region (a thresholded sum of three waves)."""
    phase = rng.uniform(0, 2 * np.pi, 3)
    wave = np.sin(a / 4.0 + phase[0]) + np.sin(s / 4.5 + phase[1]) + np.sin((a + s) / 5 + side / 8 + phase[2])
    return wave > np.quantile(wave, 1 - share) if share else np.zeros(a.size, bool)
