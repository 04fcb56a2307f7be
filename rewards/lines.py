"""Completions as JSON lines, scored as they stream by.

A line is an object with `question_id`, `completion` and `truth` (`{"grades": {attribute: grade}, "bbox": six inclusive
integers or null}`; a grade of null was not graded), and may have `example_id`, `visit` (`00M`, ...), `side`, `shape`
(slices, x, y) and `spacing_mm`. Lines in a row with the same `example_id` are one group.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from rewards.ontology import QUESTIONS
from rewards.records import truth_from_dict
from rewards.suite import RewardError, RewardRow, RewardSuite
from rewards.types import Example, VolumeRef

UNKNOWN_SHAPE = (2**31, 2**31, 2**31)
"""A grid that no box leaves, for lines that do not say how large the volume is."""
_SURROGATE = re.compile("[\ud800-\udfff]")


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
    """Parse a line; one that cannot be used says why. A byte that is not UTF-8 comes as a lone surrogate."""
    if _SURROGATE.search(text):
        return Line(number, {}, "not UTF-8; save the file in that encoding")
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        return Line(number, {}, f"not JSON: {error}")
    if not isinstance(record, dict):
        return Line(number, {}, f"not an object but {type(record).__name__}")
    try:
        return Line(number, record, example=_example(number, record))
    except (KeyError, ValueError) as error:
        what = f"it needs the field {error}" if isinstance(error, KeyError) else str(error)
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
        stranger = next((line.number for line in members if line.example != example), None)
        if stranger is not None:
            problem = (
                f"example_id {example_id!r} stands for one question and truth in line {members[0].number} and for "
                f"another in line {stranger}; give each an id of its own"
            )
            yield from (Line(line.number, {}, problem) for line in members)
            continue
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
    question_id = record["question_id"]
    if type(question_id) is not int or question_id not in QUESTIONS:
        raise ValueError(f"question_id must be a number from 1 to 69, got {question_id!r:.100}")
    example_id = record.get("example_id", f"line {number}")
    if type(example_id) not in (str, int):
        raise ValueError(f"example_id must be text or an integer, got {example_id!r:.100}")
    visit, side = record.get("visit", ""), record.get("side", "right")
    if not isinstance(visit, str):
        raise ValueError(f'visit must be text such as "00M", got {visit!r:.100}')
    if side not in ("right", "left"):
        raise ValueError(f'side must be "right" or "left", got {side!r:.100}')
    return Example(
        example_id=str(example_id),
        volume=VolumeRef(
            volume_id="",
            image_path="",
            mask_path=None,
            shape=_per_axis(record, "shape", UNKNOWN_SHAPE, (int,)),
            spacing_mm=_per_axis(record, "spacing_mm", (1.0, 1.0, 1.0), (int, float)),
        ),
        question=QUESTIONS[question_id],
        truth=truth_from_dict(record["truth"], QUESTIONS[question_id]),
        patient_id="",
        visit=visit,
        side=side,
    )


def _per_axis(
    record: dict[str, Any], name: str, default: tuple[Any, Any, Any], kinds: tuple[type, ...]
) -> tuple[Any, Any, Any]:
    if name not in record:
        return default
    value = record[name]
    if not isinstance(value, list) or [type(n) in kinds and 0 < n < math.inf for n in value] != [True] * 3:
        raise ValueError(
            f"{name} must be three positive numbers (slices, x, y) or be left out, got {value!r:.100}"
        )
    s, x, y = value
    return s, x, y
