"""The tolerant reading: every shape models and files really write, and never a lucky score.

What is thought is not answered: text in `<think>` is never read as an answer. What is answered twice must be the
same twice. A key that is not the asked question's means nothing.
"""

from __future__ import annotations

import numbers
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rewards.boxes import Box3D
from rewards.jsontext import (
    MAX_DEPTH,
    MAX_DIGITS,
    MAX_JSON_CHARS,
    MAX_MISSING_BRACES,
    MAX_OBJECTS,
    Pairs,
    close_braces,
    decode,
    decode_object,
    object_spans,
)
from rewards.keys import BOX_KEYS, WRAPPERS, attribute_name, normalise
from rewards.ontology import Question
from rewards.parts import Grid, check_box, check_grades
from rewards.types import Answer, Problem

_TAG = re.compile(r"(</?(?:think|answer)>)", re.IGNORECASE)
_MARKER = re.compile(r"final diagnosis\s{0,8}:", re.IGNORECASE)
_INTEGER = re.compile(r"\s{0,8}(-?[0-9]{1,6})(?:\.0{1,6})?\s{0,8}")
# possessive: a blank is given to one repeat and stays there, so the match is linear
_BARE_GRADE = re.compile(r"\s*+([0-9]{1,2})(?:\.0)?\s*+\.?\s*+")
# `[1, 2, 3, 4, 5, 6], "key": ` just before an object that lost its opening brace, as two public templates do
_KEY_BEFORE = re.compile(r'(?:(\[[^\[\]{}"]{1,80}\])\s{0,4},\s{0,4})?"([^"\\{}]{1,80})"\s{0,4}:\s{0,4}$')
_KEY_WINDOW = 200
# Stands between separate pieces of a text; JSON allows it nowhere, so no object is glued from two pieces.
_SEAM = "\n\x00\n"


@dataclass(slots=True)
class Reading:
    """What one object says about the asked question."""

    grades: dict[str, Any] = field(default_factory=dict)
    boxes: list[Any] = field(default_factory=list)
    repeated: bool = False
    """Whether an attribute was given twice."""
    foreign: list[str] = field(default_factory=list)
    """Paths of keys that are not the asked question's."""


def read_tolerant(text: str, question: Question, shape: Grid | None) -> Answer:
    """Read a completion of any accepted shape; see `rewards.reading.read_answer`."""
    reasoning, region, in_answer_tag = split_reasoning(text)
    problem, readings = read_region(region, question)
    if problem is Problem.MISSING_ANSWER:
        if in_answer_tag and region.strip():
            problem = Problem.NOT_JSON
        elif "<answer" in reasoning or "{" in reasoning:
            problem = Problem.ANSWER_IN_THINK
    if problem is not Problem.NONE:
        return unread(problem, reasoning)
    return agree(readings, question, shape, reasoning)


def read_region(region: str, question: Question) -> tuple[Problem, list[Reading]]:
    """What each object in the answering part of a text says; MISSING_ANSWER when there is no brace at all."""
    if len(region) > MAX_JSON_CHARS:
        return Problem.TOO_LONG, []
    bare = _BARE_GRADE.fullmatch(region)
    if bare and len(question.attributes) == 1:
        return Problem.NONE, [Reading({question.attributes[0].name: int(bare[1])})]
    problem, objects = find_objects(region)
    return problem, [interpret(pairs, question) for pairs in objects]


def agree(readings: list[Reading], question: Question, shape: Grid | None, reasoning: str = "") -> Answer:
    """The answer that all readings of one text agree on, for grades and box each."""
    grades, grades_problem = agree_on_grades(readings, question)
    bbox, bbox_problem = agree_on_box(readings, shape)
    several = Problem.SEVERAL_ANSWERS in (grades_problem, bbox_problem)
    return Answer(
        grades=grades,
        bbox=bbox,
        reasoning=reasoning,
        format_problem=Problem.SEVERAL_ANSWERS if several else Problem.NONE,
        grades_problem=grades_problem,
        bbox_problem=bbox_problem,
    )


def unread(problem: Problem, reasoning: str = "") -> Answer:
    """An answer of which nothing was read."""
    return Answer(
        reasoning=reasoning,
        format_problem=problem,
        grades_problem=Problem.MISSING_GRADES,
        bbox_problem=Problem.MISSING_BOX,
    )


def split_reasoning(text: str) -> tuple[str, str, bool]:
    """Split a completion into (reasoning, text that may hold the answer, whether that came from `<answer>` tags).

    All text up to a `</think>` is reasoning, also without `<think>`, which some chat templates write themselves;
    a `<think>` that is never closed takes the rest. Outside of it the contents of all `<answer>` tags, else
    everything; and of that the part after the first `Final diagnosis:`, where there is one.
    """
    thoughts: list[str] = []
    outside: list[str] = []
    answers: list[str] = []
    pieces = _TAG.split(text)  # text and tag in turn
    into, begun = outside, 0
    for i in range(1, len(pieces), 2):
        tag = pieces[i].lower()
        if into is thoughts:
            if tag != "</think>":
                continue
            thoughts.append("".join(pieces[begun:i]))
        elif tag == "</think>" and not thoughts:
            # everything before was reasoning that lost its opening tag
            thoughts, outside, answers = ["".join(pieces[:i])], [], []
        else:
            into.append(pieces[i - 1])
        into = thoughts if tag == "<think>" else answers if tag == "<answer>" else outside
        begun = i + 1
    into.append("".join(pieces[begun:]))
    region = _SEAM.join(answers or outside)
    marker = _MARKER.search(region)
    if marker:
        thoughts.append(region[: marker.start()])
        region = region[marker.end() :]
    return "\n".join(thoughts).strip(), region, bool(answers)


def find_objects(region: str) -> tuple[Problem, list[Pairs]]:
    """All JSON objects in a text, outermost ones only.

    Returns:
        (NONE, objects), or why there is none: NOT_JSON or TOO_DEEP for the first that failed, SEVERAL_ANSWERS for
        more than `MAX_OBJECTS`, MISSING_ANSWER when the text has no brace at all.
    """
    spans, unclosed = object_spans(region)
    if len(spans) > MAX_OBJECTS:
        return Problem.SEVERAL_ANSWERS, []
    objects: list[Pairs] = []
    first_problem = Problem.NOT_JSON if spans or unclosed else Problem.MISSING_ANSWER
    if 0 < len(unclosed) <= MAX_MISSING_BRACES:
        problem, value = decode_object(close_braces(region[unclosed[0] :], len(unclosed)))
        if isinstance(value, Pairs):
            objects.append(value)
            spans = [span for span in spans if span[0] < unclosed[0]]
    for number, (start, end) in enumerate(spans):
        problem, value = decode_object(region[start:end])
        if isinstance(value, Pairs):
            objects.append(_with_key_before(region, start, value))
        elif number == 0:
            first_problem = problem
    return (Problem.NONE if objects else first_problem), objects


def _with_key_before(region: str, start: int, value: Pairs) -> Pairs:
    before = _KEY_BEFORE.search(region, max(0, start - _KEY_WINDOW), start)
    if before is None:
        return value
    pairs = Pairs([(before[2], value)])
    if before[1]:
        pairs.append(("bbox", decode(before[1], whole_floats=True)[1]))
    return pairs


def interpret(pairs: Pairs, question: Question) -> Reading:
    """What an object says about this question; keys that are not this question's are noted and left."""
    reading = Reading()
    _walk(pairs, "", question, reading)
    return reading


def _walk(pairs: Pairs, prefix: str, question: Question, reading: Reading) -> None:
    for key, value in pairs:
        word = normalise(key)
        if word in BOX_KEYS and prefix in ("", normalise(question.entity)):
            if value is not None:
                reading.boxes.append(value)
            continue
        path = prefix if word in WRAPPERS else f"{prefix}_{word}".strip("_")
        if isinstance(value, Pairs):
            _walk(value, path, question, reading)
            continue
        name = attribute_name(path, question)
        if name is None:
            reading.foreign.append(path)
        elif name in reading.grades:
            reading.repeated = True
        else:
            reading.grades[name] = value


def agree_on_grades(readings: list[Reading], question: Question) -> tuple[dict[str, int], Problem]:
    """The grades all readings agree on; SEVERAL_ANSWERS when two differ."""
    found: list[tuple[dict[str, int], Problem]] = []
    for reading in readings:
        if reading.repeated:
            found.append(({}, Problem.DUPLICATE_KEY))
        elif reading.grades:
            found.append(check_grades(reading.grades, question, as_integer))
    if not found:
        strangers = any(reading.foreign for reading in readings)
        return {}, Problem.UNKNOWN_KEY if strangers else Problem.MISSING_GRADES
    if any(other != found[0] for other in found):
        return {}, Problem.SEVERAL_ANSWERS
    return found[0]


def agree_on_box(readings: list[Reading], shape: Grid | None) -> tuple[Box3D | None, Problem]:
    """The box all readings agree on; SEVERAL_ANSWERS when two differ, DUPLICATE_KEY for two in one object."""
    if any(len(reading.boxes) > 1 for reading in readings):
        return None, Problem.DUPLICATE_KEY
    found = [check_box(reading.boxes[0], as_integer, shape) for reading in readings if reading.boxes]
    if not found:
        return None, Problem.MISSING_BOX
    if any(other != found[0] for other in found):
        return None, Problem.SEVERAL_ANSWERS
    return found[0]


def as_integer(value: Any) -> int | None:
    """2, "2", "2.0" and 2.0 are 2; True, NaN, "0-3", lists and everything else are no integer."""
    if isinstance(value, bool):
        return None
    if isinstance(value, str):
        match = _INTEGER.fullmatch(value)
        return int(match[1]) if match else None
    # numpy integers of a parsed file are Integral; NaN and inf fail the comparison
    if isinstance(value, (numbers.Integral, float)) and abs(value) < 10**MAX_DIGITS:
        return int(value) if int(value) == value else None
    return None


def as_pairs(mapping: Mapping[str, Any], depth: int = 1) -> Pairs:
    """A mapping as `Pairs`, so that files already parsed are read like text.

    Raises:
        ValueError: nested deeper than `MAX_DEPTH`.
    """
    if depth > MAX_DEPTH:
        raise ValueError(f"nested deeper than {MAX_DEPTH}")
    return Pairs(
        (str(key), as_pairs(value, depth + 1) if isinstance(value, Mapping) else value)
        for key, value in mapping.items()
    )
