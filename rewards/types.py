"""The types that all three packages speak: a question about a volume, its truth, and an answer.

Shapes and units: boxes are in voxels of the volume file's own grid (see `rewards.boxes`), spacing in mm.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

from rewards.boxes import Box3D
from rewards.ontology import Question

Side = Literal["right", "left"]
ReaderMode = Literal["strict", "tolerant"]
Reasoning = Literal["required", "none"]


@dataclass(frozen=True, slots=True)
class VolumeRef:
    """A volume on disk. `shape` is (slices, x, y) of the file's grid in the configured box convention."""

    volume_id: str
    """`{patient}_{time}_{study}_{series}_{side}` as in the public result files."""
    image_path: str
    mask_path: str | None
    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    """Voxel size along (slice, x, y)."""


@dataclass(frozen=True, slots=True)
class Truth:
    """What is right: one grade for each attribute that was graded, and the true box where there is one."""

    grades: Mapping[str, int]
    """Attribute name (`Question.attributes[i].name`) -> grade. An attribute that was not graded is absent."""
    bbox: Box3D | None


@dataclass(frozen=True, slots=True)
class Example:
    """One question about one volume, with its truth."""

    example_id: str
    """`{volume_id}_{question_id}`."""
    volume: VolumeRef
    question: Question
    truth: Truth
    patient_id: str
    visit: str
    """Time point as the dataset writes it: `00M`, `12M`, ..."""
    side: Side
    reasoning: str = ""
    """The dataset's reasoning text, a fixed template per question and grade.

    It leaks the grade: never put it in a prompt.
    """


class Problem(Enum):
    """Why a part of a completion could not be read. `NONE` means it was read."""

    NONE = "none"
    # the format as a whole
    TOO_LONG = "too_long"
    MISSING_THINK = "missing_think"
    EMPTY_THINK = "empty_think"
    UNEXPECTED_THINK = "unexpected_think"
    MISSING_ANSWER = "missing_answer"
    SEVERAL_ANSWERS = "several_answers"
    ANSWER_IN_THINK = "answer_in_think"
    TEXT_OUTSIDE = "text_outside"
    # the JSON inside
    NOT_JSON = "not_json"
    NOT_AN_OBJECT = "not_an_object"
    DUPLICATE_KEY = "duplicate_key"
    TOO_DEEP = "too_deep"
    UNKNOWN_KEY = "unknown_key"
    # the grades
    MISSING_GRADES = "missing_grades"
    MISSING_ATTRIBUTE = "missing_attribute"
    NOT_AN_INTEGER = "not_an_integer"
    OUTSIDE_GRADE_SPACE = "outside_grade_space"
    # the box
    MISSING_BOX = "missing_box"
    BOX_NOT_SIX_INTEGERS = "box_not_six_integers"
    BOX_INVERTED = "box_inverted"
    BOX_OUTSIDE_VOLUME = "box_outside_volume"
    """The only problem whose part is kept: the box was read, and IoU counts its outside voxels against it."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A completion as read: each part carries its own problem, so a bad box does not spoil good grades."""

    grades: Mapping[str, int] = field(default_factory=dict)
    bbox: Box3D | None = None
    reasoning: str = ""
    format_problem: Problem = Problem.NONE
    grades_problem: Problem = Problem.NONE
    bbox_problem: Problem = Problem.NONE
    strict: bool = False
    """Whether the completion keeps the declared format to the letter (`rewards.reading`), in either mode."""

    @property
    def ok(self) -> bool:
        """True when format, grades and box were all read."""
        return self.format_problem is self.grades_problem is self.bbox_problem is Problem.NONE
