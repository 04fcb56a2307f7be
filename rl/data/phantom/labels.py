"""Region labels of the phantom's masks, which question asks about which, and the box of a region."""

from __future__ import annotations

import numpy as np

from rewards.boxes import Box3D
from rewards.ontology import QUESTIONS
from rl.data.boxes import Convention, mask_box

BONE_REGIONS = tuple(QUESTIONS[i].region for i in range(1, 16))
CARTILAGE_REGIONS = tuple(QUESTIONS[i].region for i in range(16, 30))
OSTEOPHYTE_SITES = tuple(QUESTIONS[i].region for i in range(30, 42))
MENISCUS_SEGMENTS = tuple(
    f"{side} meniscus {part}" for side in ("medial", "lateral") for part in ("anterior", "body", "posterior")
)

_NAMES = (
    *BONE_REGIONS,
    *(f"{region} cartilage" for region in CARTILAGE_REGIONS),
    *(f"{site} osteophyte" for site in OSTEOPHYTE_SITES),
    *MENISCUS_SEGMENTS,
    "medial meniscus root",
    "lateral meniscus root",
    "Hoffa fat pad",
    "joint cavity",
    "ACL",
    "PCL",
    "patellar tendon",
    "pes anserine bursa",
    "iliotibial band",
    "popliteal fossa",
    "infrapatellar bursa",
    "prepatellar bursa",
    "proximal tibiofibular recess",
    "posterior recess",
    "femur shaft",
    "tibia shaft",
    "fibula",
)

LABELS: dict[str, int] = {name: index for index, name in enumerate(_NAMES, start=1)}
"""Region name -> uint8 id in the mask; 0 is background."""


TEXT_ORDER = Convention(axes=(2, 0, 1), flip=(False, False, False), inclusive=True)
"""The phantom writes boxes in the default convention: slice is file axis 2, x axis 0, y axis 1."""


def _question_regions() -> dict[int, tuple[str, ...]]:
    regions: dict[int, tuple[str, ...]] = {}
    for i in range(1, 16):
        regions[i] = (QUESTIONS[i].region,)
    for i in range(16, 30):
        regions[i] = (f"{QUESTIONS[i].region} cartilage",)
    for i in range(30, 42):
        regions[i] = (f"{QUESTIONS[i].region} osteophyte",)
    regions[42], regions[43] = ("Hoffa fat pad",), ("joint cavity",)
    for i, segment in zip((44, 45, 46, 47), (0, 1, 3, 4), strict=True):
        regions[i] = (MENISCUS_SEGMENTS[segment],)
    for i in range(48, 54):
        regions[i] = (MENISCUS_SEGMENTS[i - 48],)
    for i in (54, 56):
        regions[i], regions[i + 1] = MENISCUS_SEGMENTS[:3], MENISCUS_SEGMENTS[3:]
    regions[58], regions[59] = ("medial meniscus root",), ("lateral meniscus root",)
    for i, name in zip(range(60, 70), _NAMES[_NAMES.index("ACL") :], strict=False):
        regions[i] = (name,)
    return regions


QUESTION_REGIONS: dict[int, tuple[str, ...]] = _question_regions()
"""Question id -> names of the regions it is about."""


def question_labels(question_id: int) -> tuple[int, ...]:
    """Mask ids that make up the region of a question (1-69)."""
    return tuple(LABELS[name] for name in QUESTION_REGIONS[question_id])


def region_box(labels: np.ndarray, question_id: int) -> Box3D:
    """Bounding box of the largest 26-connected component of a question's region.

    Args:
        labels: uint8 [X, Y, S] mask.

    Raises:
        ValueError: when the region is empty in this mask.
    """
    box = mask_box(labels, question_labels(question_id), TEXT_ORDER)
    if box is None:
        raise ValueError(f"the region of question {question_id} is empty in this mask")
    return box
