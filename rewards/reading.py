"""Reading answers: any text in, an `Answer` out, each part with its own named problem.

The declared format is

    <think>reasoning</think><answer>{"bbox": [six integers], "MOAKS_scores": {entity: {attribute: grade}}}</answer>

once and nothing else; without reasoning the `<think>` part must be absent. White space may stand around the two
parts and, as JSON allows it, inside the object. *Strict* reads exactly this. *Tolerant* reads it too, and every
other shape that models and files write (`rewards.tolerant`). Both are total: they return for any string, in time
linear in its length, and never raise.

| input | strict | tolerant |
|---|---|---|
| over `MAX_CHARS`, or an answer over `MAX_JSON_CHARS` | TOO_LONG | TOO_LONG |
| two answers | SEVERAL_ANSWERS | read when equal, else SEVERAL_ANSWERS for the part that differs |
| answer only inside the reasoning | ANSWER_IN_THINK | ANSWER_IN_THINK |
| a key twice | DUPLICATE_KEY | DUPLICATE_KEY, also under two spellings |
| `true`, NaN, 1e400, 2.5, "0-3", a list of grades | NOT_AN_INTEGER | NOT_AN_INTEGER |
| "2", 2.0 | NOT_AN_INTEGER | 2 |
| first > last in a pair of the box | BOX_INVERTED | BOX_INVERTED |
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from rewards.boxes import Box3D
from rewards.jsontext import Pairs, decode
from rewards.ontology import Question
from rewards.parts import Grid, check_box, check_grades
from rewards.tolerant import agree, as_pairs, interpret, read_region, read_tolerant, split_reasoning, unread
from rewards.types import Answer, Problem, ReaderMode, Reasoning, Truth

MAX_CHARS = 262_144
"""Longest completion that is looked at, reasoning included."""

_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_LETTER_OR_DIGIT = re.compile(r"[^\W_]")
# problems of a value, not of the format: the declared shape was kept
_VALUE_PROBLEMS = frozenset(
    {Problem.NONE, Problem.OUTSIDE_GRADE_SPACE, Problem.BOX_INVERTED, Problem.BOX_OUTSIDE_VOLUME}
)


def read_answer(
    text: str,
    question: Question,
    *,
    mode: ReaderMode = "strict",
    reasoning: Reasoning = "required",
    shape: Grid | None = None,
) -> Answer:
    """Read a completion. Never raises, whatever the text (an unknown mode is a ValueError).

    Args:
        text: the completion, without special tokens.
        question: the question it answers.
        mode: "strict" takes the declared format only, "tolerant" every shape models write.
        reasoning: the declared format: "required" (`<think>` first) or "none" (no `<think>` at all). The tolerant
            mode takes both; it decides `Answer.strict` there.
        shape: (slices, x, y) of the file's grid; when given, a box that leaves it is flagged BOX_OUTSIDE_VOLUME.

    Returns:
        The answer. `strict` tells in both modes whether the declared format was kept: envelope, JSON, keys, and six
        integers for the box and one for each grade. A value that is wrong (outside its grade space, an inverted
        box) is not a matter of format.
    """
    if mode not in ("strict", "tolerant") or reasoning not in ("required", "none"):
        raise ValueError(
            f'mode is "strict" or "tolerant" and reasoning "required" or "none", got {mode!r} and {reasoning!r}'
        )
    if len(text) > MAX_CHARS:
        return unread(Problem.TOO_LONG)
    answer = _read_strict(text, question, reasoning, shape)
    if mode == "strict" or answer.ok:
        return answer
    return replace(read_tolerant(text, question, shape), strict=answer.strict)


def read_truth(final_diagnosis: str | Mapping[str, Any], question: Question) -> Truth:
    """Read the dataset's answer to a question, in any shape the tolerant reader takes, or already parsed.

    An attribute that is absent or null was not graded and is left out. So is a box that is absent or null.

    Raises:
        ValueError: no grade, or a grade or box that cannot be read; names the question and what is wrong.
    """
    if isinstance(final_diagnosis, str):
        problem, readings = read_region(split_reasoning(final_diagnosis)[1], question)
    else:
        problem, readings = Problem.NONE, [interpret(as_pairs(final_diagnosis), question)]
    answer = agree(readings, question, None)
    foreign = sorted({path for reading in readings for path in reading.foreign})
    wrong = [] if problem is Problem.NONE else [problem.value]
    if answer.grades_problem is Problem.MISSING_ATTRIBUTE and answer.grades:
        # a key we do not know may be the missing attribute: never drop a truth in silence
        wrong += [f"unknown keys {foreign}"] if foreign else []
    elif answer.grades_problem is not Problem.NONE:
        wrong.append(f"grades: {answer.grades_problem.value}" + (f" {foreign}" if foreign else ""))
    if answer.bbox_problem not in (Problem.NONE, Problem.MISSING_BOX):
        wrong.append(f"bbox: {answer.bbox_problem.value}")
    if wrong:
        raise ValueError(
            f"truth of question {question.question_id} ({question.entity}) cannot be read: "
            f"{'; '.join(wrong)} in {str(final_diagnosis)[:300]!r}"
        )
    return Truth(answer.grades, answer.bbox)


def format_answer(
    question: Question, grades: Mapping[str, int], bbox: Box3D | None, reasoning: str | None = None
) -> str:
    """The completion in the declared format: with `<think>` when reasoning text is given, without it when None.

    Without a box the `bbox` key is left out, and the strict reader reports MISSING_BOX.

    Raises:
        ValueError: a grade that the question does not have or that lies outside its grade space, or reasoning that
            is empty or contains one of the format's tags.
    """
    names = [attribute.name for attribute in question.attributes]
    for name, grade in grades.items():
        if name not in names:
            raise ValueError(f"question {question.question_id} has no attribute {name!r}; it has {names}")
        if type(grade) is not int or grade not in question.attribute(name).grades:
            raise ValueError(
                f"question {question.question_id}: {name!r} is {grade!r}, "
                f"not a grade in {list(question.attribute(name).grades)}"
            )
    content: dict[str, Any] = {} if bbox is None else {"bbox": bbox.to_text()}
    content["MOAKS_scores"] = {question.entity: {name: grades[name] for name in names if name in grades}}
    answer = f"<answer>{json.dumps(content)}</answer>"
    if reasoning is None:
        return answer
    if not _LETTER_OR_DIGIT.search(reasoning) or any(tag in reasoning for tag in _TAGS):
        raise ValueError(f"reasoning must have text and none of {', '.join(_TAGS)}: {reasoning[:200]!r}")
    return f"<think>{reasoning}</think>{answer}"


def _read_strict(text: str, question: Question, reasoning: Reasoning, shape: Grid | None) -> Answer:
    problem, thought, body = _open_envelope(text.strip(), reasoning)
    if problem is not Problem.NONE:
        return unread(problem, thought)
    problem, value = decode(body)
    if problem is not Problem.NONE:
        return unread(problem, thought)
    if not isinstance(value, Pairs):
        return unread(Problem.NOT_AN_OBJECT, thought)
    scores = [item for key, item in value if key == "MOAKS_scores"]
    boxes = [item for key, item in value if key == "bbox"]
    if len(scores) + len(boxes) < len(value):
        return unread(Problem.UNKNOWN_KEY, thought)
    grades, grades_problem = _strict_grades(scores, question)
    bbox, bbox_problem = _strict_box(boxes, shape)
    return Answer(
        grades=grades,
        bbox=bbox,
        reasoning=thought,
        grades_problem=grades_problem,
        bbox_problem=bbox_problem,
        strict=grades_problem in _VALUE_PROBLEMS and bbox_problem in _VALUE_PROBLEMS,
    )


def _open_envelope(text: str, reasoning: Reasoning) -> tuple[Problem, str, str]:
    """(problem, reasoning, text between the answer tags)."""
    thought = ""
    if reasoning == "none":
        if "<think>" in text or "</think>" in text:
            return Problem.UNEXPECTED_THINK, "", ""
    else:
        if not text.startswith("<think>"):
            return (Problem.TEXT_OUTSIDE if "<think>" in text else Problem.MISSING_THINK), "", ""
        thought, closed, text = text.removeprefix("<think>").partition("</think>")
        if "<answer>" in thought or "</answer>" in thought:
            return Problem.ANSWER_IN_THINK, thought, ""
        if not closed:
            return Problem.MISSING_ANSWER, thought, ""
        if "<think>" in thought or "<think>" in text or "</think>" in text:
            several = text.count("<answer>") > 1
            return Problem.SEVERAL_ANSWERS if several else Problem.UNEXPECTED_THINK, thought, ""
        if not _LETTER_OR_DIGIT.search(thought):
            return Problem.EMPTY_THINK, thought, ""
        thought, text = thought.strip(), text.strip()
    if "<answer>" not in text or "</answer>" not in text:
        return Problem.MISSING_ANSWER, thought, ""
    if text.count("<answer>") > 1 or text.count("</answer>") > 1:
        return Problem.SEVERAL_ANSWERS, thought, ""
    if not (text.startswith("<answer>") and text.endswith("</answer>")):
        return Problem.TEXT_OUTSIDE, thought, ""
    return Problem.NONE, thought, text.removeprefix("<answer>").removesuffix("</answer>")


def _strict_grades(scores: list[Any], question: Question) -> tuple[dict[str, int], Problem]:
    """Structure first (a wrong key spoils all grades), then each value by itself."""
    if not scores:
        return {}, Problem.MISSING_GRADES
    if len(scores) > 1:
        return {}, Problem.DUPLICATE_KEY
    if not isinstance(scores[0], Pairs):
        return {}, Problem.NOT_AN_OBJECT
    entities = [key for key, _ in scores[0]]
    if entities != [question.entity]:
        if not entities:
            return {}, Problem.MISSING_GRADES
        return {}, Problem.DUPLICATE_KEY if set(entities) == {question.entity} else Problem.UNKNOWN_KEY
    values = scores[0][0][1]
    if not isinstance(values, Pairs):
        return {}, Problem.NOT_AN_OBJECT
    found = dict(values)
    if len(found) < len(values):
        return {}, Problem.DUPLICATE_KEY
    if not found:
        return {}, Problem.MISSING_GRADES
    if not found.keys() <= {attribute.name for attribute in question.attributes}:
        return {}, Problem.UNKNOWN_KEY
    return check_grades(found, question, _plain_integer)


def _strict_box(boxes: list[Any], shape: Grid | None) -> tuple[Box3D | None, Problem]:
    if not boxes:
        return None, Problem.MISSING_BOX
    if len(boxes) > 1:
        return None, Problem.DUPLICATE_KEY
    return check_box(boxes[0], _plain_integer, shape)


def _plain_integer(value: Any) -> int | None:
    return value if type(value) is int else None
