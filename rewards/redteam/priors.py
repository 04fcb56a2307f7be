"""What can be earned without looking at the image: not a trick, but what every trained model must be compared with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from rewards.boxes import Box3D
from rewards.ontology import Question
from rewards.redteam.cases import Case

Prior = Callable[[Sequence[Case], Sequence[Case], np.random.Generator], list[str]]
"""From training cases, the cases to answer and a random generator to one completion for each case."""


def constant_zero(train: Sequence[Case], test: Sequence[Case], rng: np.random.Generator) -> list[str]:
    """Grade 0 everywhere, and the middle of the volume."""
    return [case.wrap(case.body()) for case in test]


def train_majority(train: Sequence[Case], test: Sequence[Case], rng: np.random.Generator) -> list[str]:
    """The commonest training grade of each attribute, and the middle of the volume."""
    common = _majority(train)
    return [case.declared(common[case.example.question.question_id], case.middle) for case in test]


def train_majority_and_mean_box(
    train: Sequence[Case], test: Sequence[Case], rng: np.random.Generator
) -> list[str]:
    """The commonest training grade of each attribute, and the mean training box of each question."""
    common, boxes = _majority(train), _mean_boxes(train)
    ids = [case.example.question.question_id for case in test]
    return [case.declared(common[i], boxes[i]) for case, i in zip(test, ids, strict=True)]


def random_grades_and_box(train: Sequence[Case], test: Sequence[Case], rng: np.random.Generator) -> list[str]:
    """A uniformly random grade of each attribute, and a random box."""
    completions = []
    for case in test:
        grades = {a.name: int(rng.choice(list(a.grades))) for a in case.example.question.attributes}
        low_high = [np.sort(rng.choice(n + 1, 2, replace=False)) for n in case.example.volume.shape]
        completions.append(case.declared(grades, Box3D(*(int(n) for pair in low_high for n in pair))))
    return completions


def copy_of_the_previous_answer(
    train: Sequence[Case], test: Sequence[Case], rng: np.random.Generator
) -> list[str]:
    """The true answer of another knee to the same question."""
    other = {case.example.question.question_id: case.example.truth for case in train}
    truths = [other[case.example.question.question_id] for case in test]
    return [case.declared(truth.grades, truth.bbox) for case, truth in zip(test, truths, strict=True)]


PRIORS: Mapping[str, Prior] = {
    prior.__name__: prior
    for prior in (
        constant_zero,
        train_majority,
        train_majority_and_mean_box,
        random_grades_and_box,
        copy_of_the_previous_answer,
    )
}


def _majority(train: Sequence[Case]) -> dict[int, dict[str, int]]:
    counts: dict[tuple[int, str], Counter[int]] = {}
    questions: dict[int, Question] = {}
    for case in train:
        question = case.example.question
        questions[question.question_id] = question
        for name, grade in case.example.truth.grades.items():
            counts.setdefault((question.question_id, name), Counter())[grade] += 1
    return {
        i: {a.name: counts[i, a.name].most_common(1)[0][0] for a in question.attributes}
        for i, question in questions.items()
    }


def _mean_boxes(train: Sequence[Case]) -> dict[int, Box3D]:
    texts: dict[int, list[list[int]]] = {}
    for case in train:
        if case.example.truth.bbox is not None:
            texts.setdefault(case.example.question.question_id, []).append(case.example.truth.bbox.to_text())
    return {
        i: Box3D.from_text(np.mean(rows, axis=0).round().astype(int).tolist()) for i, rows in texts.items()
    }
