"""Completions as JSON lines, scored as they stream by.

A line is an object with `question_id`, `completion` and `truth` (`{"grades": {attribute: grade}, "bbox": six inclusive
integers or null}`), and may have `example_id`, `visit` (`00M`, ...), `side`, `shape` (slices, x, y) and `spacing_mm`.
Lines in a row with the same `example_id` are one group.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from rewards.boxes import Box3D
from rewards.ontology import QUESTIONS
from rewards.suite import RewardError, RewardRow, RewardSuite
from rewards.types import Example, Truth, VolumeRef

UNKNOWN_SHAPE = (2**31, 2**31, 2**31)
"""A grid that no box leaves, for lines that do not say how large the volume is."""


@dataclass(frozen=True, slots=True)
class Line:
    """A line of the input."""

    number: int
    """From 1."""
    record: dict[str, Any]
    """Empty when the line cannot be used."""
    problem: str = ""
    """Why it cannot be used or scored."""
    example: Example | None = None
    row: RewardRow | None = None


def read_line(number: int, text: str) -> Line:
    """Parse a line; one that cannot be used says why."""
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        return Line(number, {}, f"not JSON: {error}")
    if not isinstance(record, dict):
        return Line(number, {}, f"not an object but {type(record).__name__}")
    try:
        return Line(number, record, example=_example(number, record))
    except (KeyError, ValueError, TypeError) as error:
        what = f"no field {error}" if isinstance(error, KeyError) else str(error)
        return Line(number, {}, what)


def score_lines(suite: RewardSuite, texts: Iterable[str]) -> Iterator[Line]:
    """Score lines in order, group by group; empty ones are skipped. A bad line or group carries its problem."""
    lines = (read_line(number, text) for number, text in enumerate(texts, start=1) if text.strip())
    for example_id, group in groupby(lines, lambda line: line.example and line.example.example_id):
        members = list(group)
        if example_id is None:
            yield from members
            continue
        example = members[0].example
        assert example is not None
        try:
            rows = suite.score_group(example, [line.record["completion"] for line in members])
        except RewardError as error:
            yield from (Line(line.number, {}, str(error)) for line in members)
        else:
            for line, row in zip(members, rows, strict=True):
                yield Line(line.number, line.record, "", example, row)


def scored_record(line: Line) -> dict[str, Any]:
    """The line's own fields, and what it earned."""
    assert line.row is not None
    answer = line.row.answer
    return {
        **line.record,
        "reward": line.row.total,
        "components": line.row.components,
        "closed_gates": line.row.closed_gates,
        "errors": line.row.errors,
        "problems": {
            "format": answer.format_problem.value,
            "grades": answer.grades_problem.value,
            "bbox": answer.bbox_problem.value,
        },
    }


def _example(number: int, record: dict[str, Any]) -> Example:
    if not isinstance(record["completion"], str):
        raise ValueError(f"completion must be text, got {record['completion']!r:.100}")
    question_id, truth = record["question_id"], record["truth"]
    if question_id not in QUESTIONS or isinstance(question_id, bool):
        raise ValueError(f"question_id must be 1 to 69, got {question_id!r:.100}")
    question = QUESTIONS[question_id]
    if not isinstance(truth, dict) or not isinstance(truth["grades"], dict):
        raise ValueError(f"truth must have grades by attribute, got {truth!r:.200}")
    known = {attribute.name: attribute.grades for attribute in question.attributes}
    for name, grade in truth["grades"].items():
        if name not in known:
            raise ValueError(f"question {question_id} has no attribute {name!r}; it has {list(known)}")
        if type(grade) is not int or grade not in known[name]:
            raise ValueError(f"grade of {name!r} must be in {list(known[name])}, got {grade!r:.100}")
    box = truth.get("bbox")
    if box is not None and not (isinstance(box, list) and len(box) == 6 and all(type(n) is int for n in box)):
        raise ValueError(f"bbox must be six integers or null, got {box!r:.200}")
    volume = VolumeRef(
        "",
        "",
        None,
        tuple(record.get("shape", UNKNOWN_SHAPE)),
        tuple(record.get("spacing_mm", (1.0, 1.0, 1.0))),
    )
    return Example(
        example_id=str(record.get("example_id", f"line {number}")),
        volume=volume,
        question=question,
        truth=Truth(dict(truth["grades"]), None if box is None else Box3D.from_text(box)),
        patient_id="",
        visit=str(record.get("visit", "")),
        side=record.get("side", "right"),
    )
