"""The two checks both readers share: are these the asked grades, is this a box."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rewards.boxes import Box3D
from rewards.ontology import Question
from rewards.types import Problem

Grid = tuple[int, int, int]
"""Voxels along (slices, x, y)."""
ToInteger = Callable[[Any], int | None]


def check_grades(
    found: Mapping[str, Any], question: Question, to_integer: ToInteger
) -> tuple[dict[str, int], Problem]:
    """The grades inside their grade space, and the first problem in the question's order of attributes.

    A value that cannot be read costs its own attribute only. `null` is a missing attribute.
    """
    grades: dict[str, int] = {}
    first_problem = Problem.NONE
    for attribute in question.attributes:
        value = found.get(attribute.name)
        problem = Problem.NONE
        if value is None:
            problem = Problem.MISSING_ATTRIBUTE
        elif (grade := to_integer(value)) is None:
            problem = Problem.NOT_AN_INTEGER
        elif grade not in attribute.grades:
            problem = Problem.OUTSIDE_GRADE_SPACE
        else:
            grades[attribute.name] = grade
        if first_problem is Problem.NONE:
            first_problem = problem
    return grades, first_problem


def check_box(value: Any, to_integer: ToInteger, shape: Grid | None) -> tuple[Box3D | None, Problem]:
    """The box of six inclusive integers, or why it is none. A pair with first > last is never sorted.

    A box that leaves the volume, or has a negative index, is kept and flagged: its IoU counts the voxels outside.
    """
    if not isinstance(value, (list, tuple)) or len(value) != 6:
        return None, Problem.BOX_NOT_SIX_INTEGERS
    integers = [integer for item in value if (integer := to_integer(item)) is not None]
    if len(integers) != 6:
        return None, Problem.BOX_NOT_SIX_INTEGERS
    if any(integers[axis] > integers[axis + 1] for axis in (0, 2, 4)):
        return None, Problem.BOX_INVERTED
    box = Box3D.from_text(integers)
    outside = min(integers) < 0 or (shape is not None and not box.inside(shape))
    return box, Problem.BOX_OUTSIDE_VOLUME if outside else Problem.NONE
