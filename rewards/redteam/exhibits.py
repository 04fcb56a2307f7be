"""Reward formulas that are known to be broken, written from descriptions of ones in public use.

Never train on these. They are here so that the red team can be shown to find them, each by name:

    rewards: {components: [{name: "exhibits.py:box_recall"}]}
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import astuple

from rewards.ontology import Question
from rewards.registry import reward
from rewards.types import Answer, Truth

_NUMBERS = re.compile(r'"bbox": \[([-\d, ]{1,200})\]')
_GRADE = re.compile(r": (\d)\b")


def _corners(completion: str) -> list[int]:
    """Six numbers as they stand, unchecked, ends taken as exclusive."""
    found = _NUMBERS.search(completion)
    numbers = [int(n) for n in found.group(1).split(",") if n.strip("- ")] if found else []
    return numbers if len(numbers) == 6 else [0, 1, 0, 1, 0, 1]


def _volume(corners: list[int]) -> int:
    s0, s1, x0, x1, y0, y1 = corners
    return (s1 - s0) * (x1 - x0) * (y1 - y0)


def _overlap(a: Sequence[int], b: Sequence[int]) -> int:
    sides = [max(0, min(a[i + 1], b[i + 1]) - max(a[i], b[i])) for i in (0, 2, 4)]
    return sides[0] * sides[1] * sides[2]


@reward
def signed_giou(completion: str, truth: Truth) -> float | None:
    """GIoU whose volumes keep their sign: a box inside out makes the union small or negative."""
    if truth.bbox is None:
        return None
    given, true = _corners(completion), truth.bbox.to_text()
    hull = [pick(a, b) for pick, a, b in zip((min, max) * 3, given, true, strict=True)]
    overlap = _overlap(given, true)
    union = _volume(given) + _volume(true) - overlap
    value = overlap / union - (_volume(hull) - union) / _volume(hull)
    return min(1.0, max(0.0, abs(value)))


@reward
def open_ended_iou(completion: str, truth: Truth) -> float | None:
    """IoU of inclusive corners read as exclusive ones: thin boxes have no volume, and two such divide by zero."""
    if truth.bbox is None:
        return None
    given, true = _corners(completion), truth.bbox.to_text()
    overlap = _overlap(given, true)
    return overlap / (_volume(given) + _volume(true) - overlap)


@reward
def box_recall(answer: Answer, truth: Truth) -> float | None:
    """Share of the true box that is covered: a box around everything covers all of it."""
    if truth.bbox is None:
        return None
    if answer.bbox is None:
        return 0.0
    return _overlap(astuple(answer.bbox), astuple(truth.bbox)) / truth.bbox.volume


@reward
def substring_match(completion: str, question: Question) -> float:
    """Right when one text contains the other."""
    said = completion.rpartition("<answer>")[2].removesuffix("</answer>").lower()
    region = question.region.lower()
    return float(said in region or any(word in said for word in region.split()))


@reward
def any_listed_grade(completion: str, truth: Truth) -> float:
    """Right when the true grade occurs among all the grades in the text."""
    said = set(re.findall(r"\d", completion.rpartition("<answer>")[2]))
    return sum(str(grade) in said for grade in truth.grades.values()) / len(truth.grades)


@reward
def best_of_all_answers(completion: str, truth: Truth) -> float:
    """Every answer in the text is scored and the best one kept."""
    best = 0.0
    for answer in completion.split("<answer>")[1:]:
        said = _GRADE.findall(answer)
        right = [grade == str(true) for grade, true in zip(said, truth.grades.values(), strict=False)]
        best = max(best, sum(right) / len(truth.grades))
    return best


@reward
def paid_per_answer(answer: Answer, completion: str) -> float:
    """Half a point for each answer in the declared tags."""
    return 0.5 * completion.count("</answer>")


@reward
def unanswered_is_not_wrong(answer: Answer, truth: Truth) -> float | None:
    """Right grades among the answered ones; an answer without grades is left out."""
    if not answer.grades:
        return None
    return sum(truth.grades.get(name) == g for name, g in answer.grades.items()) / len(answer.grades)


@reward
def unguarded_json(completion: str, truth: Truth) -> float:
    """Parses what stands between the tags without expecting anything else there."""
    scores = json.loads(completion.split("<answer>")[1].split("</answer>")[0])["MOAKS_scores"]
    grades = next(iter(scores.values()))
    return sum(grades[name] == grade for name, grade in truth.grades.items()) / len(truth.grades)
