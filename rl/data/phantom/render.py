"""From a knee to a sagittal series: image, mask, affine, and the noise-free lesion map."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, overload

import numpy as np

from rewards.ontology import QUESTIONS
from rl.data.phantom import lesions as place
from rl.data.phantom import tissue
from rl.data.phantom.anatomy import (
    DEPTH_OF_DEFECT,
    NUMBER_OF_BML,
    SHARE_OF_BML,
    SIZE_OF_BML,
    SIZE_OF_DEFECT,
    Knee,
)
from rl.data.phantom.labels import (
    BONE_REGIONS,
    CARTILAGE_REGIONS,
    LABELS,
    QUESTION_REGIONS,
)
from rl.data.phantom.template import (
    CARTILAGE_MM,
    EXTRUSION_MM,
    NOTCH_MM,
    Template,
    ball,
    build_template,
    make_grid,
    spur,
)

DEFAULT_SHAPE = (96, 96, 16)
DEFAULT_FOV_MM = (140.0, 140.0, 104.0)

# Codes of the lesion map; a voxel carries the code of the finding painted last.
BML, BML_CYST, CARTILAGE_PARTIAL, CARTILAGE_FULL, OSTEOPHYTE, HOFFA_BRIGHT, EFFUSION = range(1, 8)
MENISCUS_CYST, ROOT_TEAR, LIGAMENT_TEAR, LIGAMENT_BML, ACL_GRAFT, TENDON_SIGNAL, PERIARTICULAR = range(8, 15)
MORPHOLOGY = 20
"""`MORPHOLOGY + class` marks the altered part of a meniscus segment."""

HOFFA_SHARE = (0.0, 0.2, 0.5, 0.85)
EFFUSION_SHARE = (0.06, 0.33, 0.63, 0.95)
"""Share of the region that is bright, by grade."""

_MAY_HIDE = np.ones(256, bool)
_MAY_HIDE[[LABELS[name] for name in BONE_REGIONS]] = False
_MAY_HIDE[[LABELS[f"{name} cartilage"] for name in CARTILAGE_REGIONS]] = False
"""By label: whether a cyst may be painted over it."""


@overload
def render(
    knee: Knee,
    shape: tuple[int, int, int] = ...,
    fov_mm: tuple[float, float, float] = ...,
    rng: np.random.Generator | None = ...,
    *,
    return_lesions: Literal[False] = ...,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]: ...


@overload
def render(
    knee: Knee,
    shape: tuple[int, int, int] = ...,
    fov_mm: tuple[float, float, float] = ...,
    rng: np.random.Generator | None = ...,
    *,
    return_lesions: Literal[True],
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]: ...


def render(
    knee: Knee,
    shape: tuple[int, int, int] = DEFAULT_SHAPE,
    fov_mm: tuple[float, float, float] = DEFAULT_FOV_MM,
    rng: np.random.Generator | None = None,
    *,
    return_lesions: bool = False,
) -> tuple[np.ndarray, ...]:
    """A sagittal DESS-like series of a knee.

    Args:
        shape: voxels along file axes x (anterior to posterior), y (superior to inferior) and slice (towards the right).
        fov_mm: extent of the grid along the same axes.
        rng: source of the acquisition noise; None for a noise-free image.

    Returns:
        image int16 [X, Y, S], labels uint8 [X, Y, S], affine [4, 4] (voxel index to RAS mm), and with `return_lesions`
        the noise-free lesion map uint8 [X, Y, S].
    """
    template = build_template(knee, make_grid(knee, shape, fov_mm))
    image = tissue.healthy(template, knee)
    lesion_map = np.zeros(image.shape, np.uint8)
    painter = _Painter(template, knee, image, lesion_map)
    for question_id in sorted(QUESTIONS):
        painter.paint(question_id)
    affine = affine_of(shape, fov_mm)
    result = (tissue.acquire(image, rng), template.labels, affine)
    return (*result, lesion_map) if return_lesions else result


def affine_of(shape: tuple[int, int, int], fov_mm: tuple[float, float, float]) -> np.ndarray:
    """Voxel index to world (RAS, mm): axis 0 runs to posterior, 1 to inferior, 2 to the patient's right."""
    dx, dy, dz = (fov / n for fov, n in zip(fov_mm, shape, strict=True))
    affine = np.zeros((4, 4))
    affine[1, 0], affine[2, 1], affine[0, 2], affine[3, 3] = -dx, -dy, dz, 1
    centre = (np.array(shape) - 1) / 2
    affine[:3, 3] = -affine[:3, :3] @ centre
    return affine


class _Painter:
    """Paints the findings of a knee into an image and its lesion map, question by question."""

    def __init__(self, template: Template, knee: Knee, image: np.ndarray, lesion_map: np.ndarray) -> None:
        self.t, self.knee, self.image, self.map = template, knee, image, lesion_map
        order = np.argsort(template.labels, axis=None, kind="stable")
        bounds = np.searchsorted(template.labels.ravel()[order], np.arange(257))
        self._voxels = {i: order[bounds[i] : bounds[i + 1]] for i in range(1, 256)}

    def paint(self, question_id: int) -> None:
        question, grades = QUESTIONS[question_id], self.knee.grades[question_id]
        rng = np.random.default_rng((self.knee.anatomy_seed, question_id))
        if question.category == "BML":
            self._bml(question_id, grades, rng)
        elif question.category == "Cartilage":
            self._cartilage(question_id, grades, rng)
        elif question.category == "Osteophytes":
            self._osteophyte(question_id, grades["grade"])
        elif question_id in (42, 43):
            self._synovitis(question_id, grades["grade"], rng)
        elif "morphology" in grades:
            self._morphology(question_id, grades["morphology"])
        elif "tear_location" in grades:
            self._meniscal_cyst(question_id, grades)
        elif question_id in (58, 59):
            if grades["presence"]:
                self._fill(QUESTION_REGIONS[question_id][0], ROOT_TEAR, 0.9, middle=("a", 0.5))
        elif question_id in (60, 61):
            self._ligament(question_id, grades)
        elif question_id == 62:
            if grades["Signal Abnormality"]:
                self._tendon()
        elif question_id >= 63 and grades["presence"]:
            self._periarticular(question_id)

    def _at(self, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Flat indices of a region's voxels and their coordinates (a, s, l)."""
        index = self._voxels[LABELS[name]]
        plane, k = np.divmod(index, self.map.shape[2])
        g = self.t.grid
        return index, g.a.ravel()[plane], g.s.ravel()[plane], g.l.ravel()[k]

    def _set(self, index: np.ndarray, code: int, value: float) -> None:
        self.map.ravel()[index] = code
        self.image.ravel()[index] = value

    def _bml(self, question_id: int, grades: Mapping[str, int], rng: np.random.Generator) -> None:
        if not grades[SIZE_OF_BML]:
            return
        index, a, s, side = self._at(QUESTION_REGIONS[question_id][0])
        lesion, cyst = place.bone_marrow_lesion(
            a, s, side, grades[SIZE_OF_BML], grades[NUMBER_OF_BML], grades[SHARE_OF_BML], rng
        )
        self._set(index[lesion], BML, tissue.BML)
        self._set(index[cyst], BML_CYST, tissue.FLUID)

    def _cartilage(self, question_id: int, grades: Mapping[str, int], rng: np.random.Generator) -> None:
        if not grades[SIZE_OF_DEFECT]:
            return
        name = QUESTION_REGIONS[question_id][0]
        index, a, s, side = self._at(name)
        if name.startswith("femur"):
            # angle about the condyle's centre, as millimetres of arc
            along = np.arctan2(a - 2, s + 24) * 30
            height = self.t.femur.ravel()[index]
        elif name.startswith("tibia"):
            along, height = a, self.t.tibia.ravel()[index]
        else:
            along, height = s, self.t.patella.ravel()[index]
        defect, full = place.cartilage_lesion(
            along, side, grades[SIZE_OF_DEFECT], grades[DEPTH_OF_DEFECT], rng
        )
        # Fluid fills what is lost of the outer layer, dark bone shows where the inner layer is lost too: the bright
        # area is the size, the dark one the depth.
        outer = height > 0.45 * CARTILAGE_MM
        self._set(index[defect], CARTILAGE_PARTIAL, tissue.CARTILAGE)
        self._set(index[full], CARTILAGE_FULL, tissue.BARE_BONE)
        self.image.ravel()[index[defect & outer]] = tissue.FLUID

    def _osteophyte(self, question_id: int, grade: int) -> None:
        if not grade:
            return
        site = QUESTIONS[question_id].region
        index = self._voxels[LABELS[f"{site} osteophyte"]]
        depth = spur(self.t.grid, site, grade, self.knee.patella_shift_mm).ravel()[index]
        self._set(index[depth < 0], OSTEOPHYTE, tissue.OSTEOPHYTE)
        self.image.ravel()[index[(depth < 0) & (depth > -1.5)]] = tissue.CORTEX

    def _synovitis(self, question_id: int, grade: int, rng: np.random.Generator) -> None:
        index, a, s, side = self._at(QUESTION_REGIONS[question_id][0])
        if question_id == 42:
            bright = place.patches(a, s, side, HOFFA_SHARE[grade], rng)
            self._set(index[bright], HOFFA_BRIGHT, 0.75)
            return
        # fluid collects around the middle of the recess and distends it with the grade
        reach = ((a + 42) / 9) ** 2 + ((s + 55) / 13) ** 2
        self._set(index[reach <= np.quantile(reach, EFFUSION_SHARE[grade])], EFFUSION, tissue.FLUID)

    def _morphology(self, question_id: int, kind: int) -> None:
        if not kind:
            return
        index, a, s, side = self._at(QUESTION_REGIONS[question_id][0])
        ua, us, ul = (_unit(v) for v in (a, s, side))
        horizontal = np.abs(us - 0.5) < 0.16
        if "body" in QUESTIONS[question_id].region:  # seen as a slab in two slices
            radial, vertical = np.abs(ua - 0.5) < 0.1, np.abs(np.abs(ua - 0.5) - 0.25) < 0.07
            inner = 1 - np.abs(2 * ua - 1)
        else:  # seen as a wedge in three to four slices
            radial, vertical = np.abs(ul - 0.5) < 0.22, np.abs(ua - 0.5) < 0.12
            inner = 1 - _unit(np.abs(a))
        pattern = {
            1: ((np.abs(us - 0.5) < 0.3) & (np.abs(ua - 0.5) < 0.3), 0.4),
            2: (radial, 0.85),
            3: (horizontal, 0.9),
            4: (vertical, 0.9),
            5: (horizontal | vertical, 0.9),
            6: (inner > 0.5, 0.6),
            7: (inner > 0.25, 0.75),
            8: (np.ones(a.size, bool), 0.95),
        }
        where, value = pattern[kind]
        self._set(index[where], MORPHOLOGY + kind, value)
        if kind == 7:
            self.image.ravel()[index[~where]] = 0.35

    def _meniscal_cyst(self, question_id: int, grades: Mapping[str, int]) -> None:
        if not grades["presence"] or grades["tear_location"] == 3:
            return
        sign, body = (-1, 45) if question_id == 54 else (1, 47)
        rim = 46 + 0.3 * EXTRUSION_MM[self.knee.grades[body]["grade"]]
        centre = ((-38, 2, 26 * sign), (2, 3, rim * sign), (42, 4, 26 * sign))[grades["tear_location"]]
        self._ball(centre, (7.5, 8.0, 9.0), MENISCUS_CYST, tissue.FLUID)

    def _ball(
        self, centre: tuple[float, float, float], axes: tuple[float, float, float], code: int, value: float
    ) -> None:
        """Paint an ellipsoid where it does not hide subregions of bone or cartilage."""
        inside = (ball(self.t.grid, centre, axes) < 0) & _MAY_HIDE[self.t.labels]
        self.map[inside], self.image[inside] = code, value

    def _fill(self, name: str, code: int, value: float, middle: tuple[str, float]) -> None:
        index, a, s, _ = self._at(name)
        u = _unit(a if middle[0] == "a" else s)
        self._set(index[np.abs(u - 0.5) < middle[1] / 2], code, value)

    def _ligament(self, question_id: int, grades: Mapping[str, int]) -> None:
        name = "ACL" if question_id == 60 else "PCL"
        if grades["Complete Tear"]:
            self._fill(name, LIGAMENT_TEAR, 0.95, middle=("a", 0.36))
        if grades["Associated with BML/cyst at site of insertion or origin"]:
            centre = (24.0, -25.0, 4.0) if question_id == 60 else (-2.0, -23.0, -5.0)
            self._ball(centre, (7.0, 7.0, 7.0), LIGAMENT_BML, tissue.FLUID)
        if grades.get("ACL Repair"):  # a grey graft with a dark screw in the femur
            index, a, _, _ = self._at(name)
            self._set(index[np.abs(_unit(a) - 0.5) > 0.2], ACL_GRAFT, 0.5)
            g = self.t.grid
            screw = (np.abs(g.a - 8) < 4) & (g.s < -17) & (g.s > -46) & (g.l > 0) & (g.l < NOTCH_MM)
            self.map[screw], self.image[screw] = ACL_GRAFT, 0.0

    def _tendon(self) -> None:
        index, _, s, _ = self._at("patellar tendon")
        self._set(index[np.abs(_unit(s) - 0.35) < 0.25], TENDON_SIGNAL, 0.7)

    def _periarticular(self, question_id: int) -> None:
        index, a, s, side = self._at(QUESTION_REGIONS[question_id][0])
        r = (_unit(a) - 0.5) ** 2 + (_unit(s) - 0.5) ** 2 + (_unit(side) - 0.5) ** 2
        near = r < np.quantile(r, 0.6)
        self._set(index[near], PERIARTICULAR, tissue.FLUID)
        if question_id == 69:  # loose bodies: a dark body in fluid
            self.image.ravel()[index[r < np.quantile(r, 0.08)]] = tissue.CORTEX


def _unit(values: np.ndarray) -> np.ndarray:
    """Values scaled to [0, 1]."""
    low = values.min()
    return (values - low) / (values.max() - low + 1e-6)
