"""An `Example` as plain JSON-ready data and back, for dataset columns and files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from rewards.boxes import Box3D
from rewards.ontology import QUESTIONS
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
    """
    volume, truth = record["volume"], record["truth"]
    return Example(
        example_id=record["example_id"],
        volume=VolumeRef(
            **{**volume, "shape": tuple(volume["shape"]), "spacing_mm": tuple(volume["spacing_mm"])},
        ),
        question=QUESTIONS[record["question_id"]],
        truth=Truth(
            grades={name: grade for name, grade in truth["grades"].items() if grade is not None},
            bbox=Box3D.from_text(truth["bbox"]) if truth["bbox"] is not None else None,
        ),
        patient_id=record["patient_id"],
        visit=record["visit"],
        side=record["side"],
        reasoning=record["reasoning"],
    )


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
