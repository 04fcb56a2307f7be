"""A knee as numbers: shape parameters and the MOAKS grades of every question.

Grades follow the certain MOAKS rules: BML of size 0 has number 0 and share 0, a cartilage lesion of size 0 has
depth 0, morphology 7 (progressive) never occurs at the first visit.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Literal

import numpy as np

from rewards.ontology import QUESTIONS, Question
from rewards.types import Side

Mode = Literal["natural", "balanced"]

BASELINE = "00M"
"""The first visit."""

# Shares of grades 0, 1, 2, 3 in natural mode; cartilage size is the published share in the real training set.
_NATURAL_CARTILAGE_SIZE = (0.726, 0.053, 0.197, 0.024)
_NATURAL_ORDINAL = (0.75, 0.14, 0.08, 0.03)
_NATURAL_MORPHOLOGY = (0.70, 0.06, 0.03, 0.07, 0.03, 0.03, 0.05, 0.01, 0.02)
_NATURAL_PRESENCE = 0.12

SIZE_OF_BML, NUMBER_OF_BML, SHARE_OF_BML = (attribute.name for attribute in QUESTIONS[1].attributes)
SIZE_OF_DEFECT, DEPTH_OF_DEFECT = (attribute.name for attribute in QUESTIONS[16].attributes)


@dataclass(frozen=True)
class Knee:
    """One knee at one visit."""

    side: Side
    visit: str
    scale: float
    """Size relative to the template."""
    rotation_deg: float
    """Rotation in the sagittal plane."""
    translation_mm: tuple[float, float, float]
    """Shift towards posterior, inferior and lateral."""
    patella_shift_mm: float
    """Height of the patella: positive is inferior (patella baja)."""
    condyle_mm: float
    """Extra radius of the femoral condyles."""
    anatomy_seed: int
    """Seeds the places of lesions and the texture of tissue, so that follow-up visits agree."""
    grades: Mapping[int, Mapping[str, int]]
    """Question id (1-69) -> attribute name -> grade."""


def sample_knee(rng: np.random.Generator, side: Side, visit: str = BASELINE, mode: Mode = "natural") -> Knee:
    """A random knee.

    Args:
        mode: "natural" is heavy on grade 0 as the real data are; "balanced" makes the grades of an attribute about
            equally frequent.
    """
    return Knee(
        side=side,
        visit=visit,
        scale=float(np.clip(rng.normal(0.97, 0.05), 0.86, 1.03)),
        rotation_deg=float(rng.uniform(-8.0, 8.0)),
        translation_mm=(float(rng.uniform(-5, 5)), float(rng.uniform(-10, 10)), float(rng.uniform(-5, 5))),
        patella_shift_mm=float(rng.uniform(-3.0, 3.0)),
        condyle_mm=float(rng.uniform(-1.0, 1.0)),
        anatomy_seed=int(rng.integers(2**31)),
        grades={i: _sample_grades(rng, q, visit, mode) for i, q in QUESTIONS.items()},
    )


def follow_up(knee: Knee, rng: np.random.Generator, visit: str) -> Knee:
    """The same knee at a later visit: same anatomy, slightly other positioning, grades that never improve."""
    a, s, lateral = knee.translation_mm
    return replace(
        knee,
        visit=visit,
        rotation_deg=knee.rotation_deg + float(rng.uniform(-1.5, 1.5)),
        translation_mm=(
            a + float(rng.uniform(-1, 1)),
            s + float(rng.uniform(-1, 1)),
            lateral + float(rng.uniform(-1, 1)),
        ),
        grades={i: _progress(rng, QUESTIONS[i], g) for i, g in knee.grades.items()},
    )


def _sample_grades(rng: np.random.Generator, question: Question, visit: str, mode: Mode) -> dict[str, int]:
    balanced = mode == "balanced"
    names = [attribute.name for attribute in question.attributes]
    if question.category == "BML":
        size = _draw(rng, (0.25,) * 4 if balanced else _NATURAL_ORDINAL)
        number = 1 + _draw(rng, (1 / 3,) * 3 if balanced else (0.7, 0.2, 0.1))
        share = 1 + _draw(rng, (1 / 3,) * 3 if balanced else (0.1, 0.2, 0.7))
        return dict(zip(names, (size, number, share) if size else (0, 0, 0), strict=True))
    if question.category == "Cartilage":
        size = _draw(rng, (0.25,) * 4 if balanced else _NATURAL_CARTILAGE_SIZE)
        return {SIZE_OF_DEFECT: size, DEPTH_OF_DEFECT: _sample_depth(rng, size)}
    if "morphology" in names:
        shares = np.array((1 / 9,) * 9 if balanced else _NATURAL_MORPHOLOGY)
        if visit == BASELINE:
            shares[7] = 0.0
        return {"morphology": _draw(rng, tuple(shares / shares.sum()))}
    if "tear_location" in names:
        present = int(rng.random() < (0.65 if balanced else _NATURAL_PRESENCE))
        return {"presence": present, "tear_location": int(rng.integers(3)) if present else 3}
    if question.attributes[0].scale == "binary":
        return {name: int(rng.random() < (0.5 if balanced else _NATURAL_PRESENCE)) for name in names}
    return {name: _draw(rng, (0.25,) * 4 if balanced else _NATURAL_ORDINAL) for name in names}


def _sample_depth(rng: np.random.Generator, size: int) -> int:
    """Depth of a defect: the share of it that is full thickness.

    Depth 1 of a size-1 defect would be under a tenth of a tenth of the surface, smaller than a voxel column: left out.
    """
    if size == 0:
        return 0
    return (0, 2, 3)[_draw(rng, (1 / 3,) * 3)] if size == 1 else _draw(rng, (0.1, 0.4, 0.25, 0.25))


def _progress(rng: np.random.Generator, question: Question, grades: Mapping[str, int]) -> dict[str, int]:
    """Grades at the next visit: each rises by one with a small probability (MOAKS lesions rarely heal)."""
    if question.category == "BML":
        size, number, share = grades.values()
        if rng.random() < 0.2 and size < 3:
            size, number, share = size + 1, max(number, 1), max(share, 3 if size == 0 else share)
        return {SIZE_OF_BML: size, NUMBER_OF_BML: number, SHARE_OF_BML: share}
    if question.category == "Cartilage":
        size, depth = grades.values()
        if rng.random() < 0.2 and size < 3:
            size += 1
        return {SIZE_OF_DEFECT: size, DEPTH_OF_DEFECT: depth}
    if "morphology" in grades:
        morphology = grades["morphology"]
        if morphology == 6 and rng.random() < 0.5:
            morphology = 7
        elif morphology < 6 and rng.random() < 0.1:
            morphology = 6
        return {"morphology": morphology}
    if "tear_location" in grades:
        return dict(grades)
    return {
        name: min(grade + int(rng.random() < 0.15), question.attribute(name).grades.stop - 1)
        for name, grade in grades.items()
    }


def _draw(rng: np.random.Generator, shares: tuple[float, ...]) -> int:
    return bisect.bisect_right(list(accumulate(shares[:-1])), rng.random())
