"""The 69 MOAKS questions of 3DReasonKnee as facts: region, category, table columns, attributes, grade spaces.

Source: MOAKS (Hunter et al., Osteoarthritis and Cartilage 2011) as asked by the public 3DReasonKnee question
files (arXiv 2510.20967). The wording of the questions is in `rollouts.prompts`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Literal

Scale = Literal["ordinal", "nominal", "binary"]

BENCHMARK_QUESTION_IDS = tuple(range(1, 63))
"""The paper's 62 questions: ids 1-62 is our reading of it (494k = 62 x 7,970); configurable."""


@dataclass(frozen=True, slots=True)
class Attribute:
    """One graded property of a finding."""

    name: str
    scale: Scale
    grades: range
    path: tuple[str, ...]
    """Keys of the public template that lead to the grade, e.g. ("MOAKS_scores", "ACL", "Complete Tear")."""


@dataclass(frozen=True, slots=True)
class Question:
    """One of the 69 questions."""

    question_id: int
    category: str
    """One of the paper's seven (section 3.3)."""
    table2_column: str
    table3_column: str | None
    region: str
    entity: str
    """The finding's key in an answer, e.g. "femur medial central BML"."""
    attributes: tuple[Attribute, ...]

    def attribute(self, name: str) -> Attribute:
        """The attribute of that name; KeyError when this question does not ask for it."""
        for attribute in self.attributes:
            if attribute.name == name:
                return attribute
        raise KeyError(f"question {self.question_id} has no attribute {name!r}")


def _load() -> Mapping[int, Question]:
    records = json.loads((files("rewards") / "ontology.json").read_text(encoding="utf-8"))
    return {record["question_id"]: _question(record) for record in records}


def _question(record: dict) -> Question:
    attributes = tuple(
        Attribute(a["name"], a["scale"], range(a["grades"][0], a["grades"][1] + 1), tuple(a["path"]))
        for a in record["attributes"]
    )
    return Question(**{**record, "attributes": attributes})


QUESTIONS: Mapping[int, Question] = _load()
"""Question id -> question, ids 1 to 69."""
