"""An `Example` as plain JSON-ready data and back, for dataset columns and files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from rewards.boxes import Box3D
from rewards.ontology import QUESTIONS, Question
from rewards.types import Example, Truth, VolumeRef


def example_to_dict(example: Example) -> dict[str, Any]:
    """Plain data; the question by its id, the true box in text form (six inclusive integers) or None."""
    truth = example.truth
    return {
        "example_id": example.example_id,
        "volume": asdict(example.volume),
        "question_id": example.question.question_id,
        "truth": {"grades": dict(truth.grades), "bbox": truth.bbox.to_text() if truth.bbox else None},
        "patient_id": example.patient_id,
        "visit": example.visit,
        "side": example.side,
        "reasoning": example.reasoning,
    }


def example_from_dict(record: Mapping[str, Any]) -> Example:
    """Inverse of `example_to_dict`. A grade of None means not graded (Arrow gives all rows the same keys).

    Raises:
        KeyError: a missing field or unknown question id.
        ValueError: grades or a box that the question cannot have.
    """
    volume, question = record["volume"], QUESTIONS[record["question_id"]]
    return Example(
        example_id=record["example_id"],
        volume=VolumeRef(
            **{**volume, "shape": tuple(volume["shape"]), "spacing_mm": tuple(volume["spacing_mm"])},
        ),
        question=question,
        truth=truth_from_dict(record["truth"], question),
        patient_id=record["patient_id"],
        visit=record["visit"],
        side=record["side"],
        reasoning=record["reasoning"],
    )


def truth_from_dict(truth: Any, question: Question) -> Truth:
    """The truth of a question from plain data, as `example_to_dict` writes it; a grade of None means not graded.

    Raises:
        ValueError: not that form, or grades and boxes that the question cannot have.
    """
    if not isinstance(truth, Mapping) or not isinstance(truth.get("grades"), Mapping):
        raise ValueError(f'truth must be {{"grades": {{attribute: grade}}, "bbox": ...}}, got {truth!r:.200}')
    known = {attribute.name: attribute.grades for attribute in question.attributes}
    grades = {name: grade for name, grade in truth["grades"].items() if grade is not None}
    for name, grade in grades.items():
        if name not in known:
            raise ValueError(
                f"question {question.question_id} has no attribute {name!r}; it has {list(known)}"
            )
        if type(grade) is not int or grade not in known[name]:
            raise ValueError(f"grade of {name!r} must be in {list(known[name])}, got {grade!r:.100}")
    box = truth.get("bbox")
    if box is None:
        return Truth(grades, None)
    if not isinstance(box, list) or len(box) != 6:
        raise ValueError(f"bbox must be six integers or null, got {box!r:.200}")
    try:
        return Truth(grades, Box3D.from_text(box))
    except ValueError as error:
        raise ValueError(f"bbox must be first and last slice, x and y, got {box}: {error}") from None


def as_example(column: Example | Mapping[str, Any] | str) -> Example:
    """What a dataset's column holds for an example: itself, its `example_to_dict` form, or that as JSON.

    Raises:
        ValueError: anything else.
    """
    if isinstance(column, Example):
        return column
    try:
        record = json.loads(column) if isinstance(column, str) else column
        return example_from_dict(record)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"an example must be in the form of rewards.example_to_dict, or that as JSON "
            f"({type(error).__name__}: {error}), got {column!r:.300}"
        ) from error
