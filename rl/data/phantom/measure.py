"""Grades read back from the noise-free lesion map: the proof that what is drawn is what is written.

Shares are of the region's own voxels, with the thresholds of MOAKS. Meniscal extrusion is not in the lesion map (the
whole segment moves) and is measured on the mask.
"""

from __future__ import annotations

import cc3d
import numpy as np

from rewards.ontology import QUESTIONS
from rl.data.phantom import render as codes
from rl.data.phantom.anatomy import (
    DEPTH_OF_DEFECT,
    NUMBER_OF_BML,
    SHARE_OF_BML,
    SIZE_OF_BML,
    SIZE_OF_DEFECT,
    Knee,
)
from rl.data.phantom.labels import question_labels
from rl.data.phantom.template import OSTEOPHYTE_MM, RIM_MM, make_grid, place_of

_FINDING_CODE = {
    58: codes.ROOT_TEAR,
    59: codes.ROOT_TEAR,
    62: codes.TENDON_SIGNAL,
    **dict.fromkeys(range(63, 70), codes.PERIARTICULAR),
}


def measure_bml(labels: np.ndarray, lesions: np.ndarray, question_id: int) -> dict[str, int]:
    """Size, number and share of bone marrow lesions of a subregion (questions 1-15)."""
    region = np.isin(labels, question_labels(question_id))
    lesion = region & np.isin(lesions, (codes.BML, codes.BML_CYST))
    if not lesion.any():
        return {SIZE_OF_BML: 0, NUMBER_OF_BML: 0, SHARE_OF_BML: 0}
    number = int(cc3d.connected_components(np.ascontiguousarray(lesion), connectivity=26).max())
    share = (lesions[lesion] == codes.BML).mean()
    return {
        SIZE_OF_BML: _thirds(lesion.sum() / region.sum()),
        NUMBER_OF_BML: min(number, 3),
        SHARE_OF_BML: _thirds(share),
    }


def measure_cartilage(labels: np.ndarray, lesions: np.ndarray, question_id: int) -> dict[str, int]:
    """Size and depth of a cartilage lesion (questions 16-29)."""
    region = np.isin(labels, question_labels(question_id))
    defect = region & np.isin(lesions, (codes.CARTILAGE_PARTIAL, codes.CARTILAGE_FULL))
    if not defect.any():
        return {SIZE_OF_DEFECT: 0, DEPTH_OF_DEFECT: 0}
    full = (lesions[defect] == codes.CARTILAGE_FULL).mean()
    return {SIZE_OF_DEFECT: _tenths(defect.sum() / region.sum()), DEPTH_OF_DEFECT: _tenths(full)}


def measure_other(labels: np.ndarray, lesions: np.ndarray, question_id: int) -> dict[str, int]:
    """Morphology, Hoffa-synovitis, effusion and findings that are present or not (42, 43, 48-53, 58, 59, 62-69)."""
    found = lesions[np.isin(labels, question_labels(question_id))]
    if 48 <= question_id <= 53:
        kinds = found[found >= codes.MORPHOLOGY] - codes.MORPHOLOGY
        return {"morphology": int(kinds[0]) if kinds.size else 0}
    if question_id in (42, 43):
        code, shares = (
            (codes.HOFFA_BRIGHT, codes.HOFFA_SHARE)
            if question_id == 42
            else (codes.EFFUSION, codes.EFFUSION_SHARE)
        )
        share = (found == code).mean()
        return {"grade": int(np.argmin(np.abs(np.array(shares) - share)))}
    name = QUESTIONS[question_id].attributes[0].name
    return {name: int((found == _FINDING_CODE[question_id]).any())}


def measure_osteophyte(
    labels: np.ndarray, lesions: np.ndarray, question_id: int, knee: Knee, fov_mm: tuple[float, float, float]
) -> dict[str, int]:
    """Grade of a spur by how far it reaches from its root in plane (questions 30-41)."""
    spur = np.isin(labels, question_labels(question_id)) & (lesions == codes.OSTEOPHYTE)
    if not spur.any():
        return {"grade": 0}
    x, y, z = labels.shape
    grid = make_grid(knee, (x, y, z), fov_mm)
    a, s, _ = place_of(QUESTIONS[question_id].region, knee.patella_shift_mm)
    reach = np.broadcast_to(np.hypot(grid.a - a, grid.s - s), spur.shape)[spur].max()
    return {"grade": int(np.argmin(np.abs(np.array(OSTEOPHYTE_MM) - reach)))}


def measure_extrusion(
    labels: np.ndarray, question_id: int, knee: Knee, fov_mm: tuple[float, float, float]
) -> float:
    """How far a meniscus segment reaches beyond the edge it has without extrusion, in mm (questions 44-47)."""
    x, y, z = labels.shape
    grid = make_grid(knee, (x, y, z), fov_mm)
    segment = np.isin(labels, question_labels(question_id))
    if question_id in (44, 46):
        return float(-32.0 - np.broadcast_to(grid.a, segment.shape)[segment].min() + grid.pixel_mm / 2)
    return float(np.abs(np.broadcast_to(grid.l, segment.shape)[segment]).max() - RIM_MM + grid.slice_mm / 2)


def _thirds(share: float) -> int:
    return 1 if share < 1 / 3 else 2 if share <= 2 / 3 else 3


def _tenths(share: float) -> int:
    return 0 if share == 0 else 1 if share < 0.1 else 2 if share <= 0.75 else 3
