"""Which attribute a key of an answer means: the prompts' keys, the released snake_case keys, and near spellings.

The prompts write `{"femur medial central cartilage lesion": {"Size of lesion": 1}}`, the released truth
`{"femur_medial_central_cartilage_lesion.size": 1}`. Both become one path of lower-case words, wrappers dropped:
`femur_medial_central_cartilage_lesion_size`, in which the entity is a prefix and the rest names the attribute.
"""

from __future__ import annotations

import re

from rewards.ontology import QUESTIONS, Question

WRAPPERS = frozenset(
    {"moaks", "moaks_scores", "moaks_score", "moaks_grade", "moaks_grades"}
    | {"scores", "grades", "answer", "final_answer", "final_diagnosis", "diagnosis"}
)
"""Keys that only wrap an answer."""
BOX_KEYS = frozenset(
    {"bbox", "box", "bounding_box", "bbox_3d", "3d_bbox", "bounding_box_3d", "3d_bounding_box"}
)
"""Keys that hold a box."""

_HEAD_WORDS = {
    "Size of BML (including cyst)": {"size"},
    "Number of BML within subregion": {"number", "count"},
    "% of lesion that is BML (excluding cyst)": {"percent", "pct", "excluding"},
    "Size of lesion": {"size"},
    "Depth of lesion": {"depth"},
    "tear_location": {"location"},
    "Complete Tear": {"tear"},
    "Associated with BML/cyst at site of insertion or origin": {"associated"},
    "ACL Repair": {"repair"},
    "Signal Abnormality": {"signal"},
}
"""The words that tell an attribute from its siblings; for the others it is the attribute's own name."""
_FILLER = frozenset({"of", "the", "grade", "score", "lesion", "bml", "bmls", "moaks"})
_GENERIC = frozenset({"grade", "score", "presence", "present"})
_NOT_A_WORD = re.compile(r"[^a-z0-9]+")


def normalise(key: str) -> str:
    """Lower-case words joined by underscores: `% of lesion` and `percent_of_lesion` become one."""
    return _NOT_A_WORD.sub("_", key.lower().replace("percentage", "percent").replace("%", " percent ")).strip(
        "_"
    )


ENTITIES = {normalise(question.entity): question_id for question_id, question in QUESTIONS.items()}
"""Normalised entity -> question id."""


def attribute_name(path: str, question: Question) -> str | None:
    """The attribute that a normalised path of keys means in an answer to this question; None when it means none.

    The path may begin with the asked entity, or leave the entity out; one that begins with another entity, or with
    words that the attribute's name does not have, means none.
    """
    entity = normalise(question.entity)
    if path == entity:
        return question.attributes[0].name if len(question.attributes) == 1 else None
    words = set(path.removeprefix(f"{entity}_").split("_"))
    if len(question.attributes) == 1 and words <= _GENERIC:
        return question.attributes[0].name
    for attribute in question.attributes:
        own = set(normalise(attribute.name).split("_"))
        heads = _HEAD_WORDS.get(attribute.name, {attribute.name})
        if words & heads and words <= own | heads | _FILLER:
            return attribute.name
    return None
