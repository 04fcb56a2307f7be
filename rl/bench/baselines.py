"""What a model must beat: the commonest grade and the mean box of the training set, and grades drawn as often as there.

Knees are aligned, so a fixed box for each region and side localises well without looking, and grade 0 is right most
of the time. The baselines answer in the declared format and are graded like any model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass

import numpy as np

from rewards.boxes import Box3D
from rewards.ontology import Question
from rewards.reading import format_answer
from rewards.types import Example, ReaderMode, Reasoning, Side
from rl.bench.answers import AnswerRow, answer_row

BASELINE_MODEL = "train-majority grade, train-mean box"
"""`RunMeta.model` of a run of `baseline_rows`; tables name its grades and its boxes apart."""
PRIOR_MODEL = "grades drawn as often as in training, train-mean box"
"""`RunMeta.model` of a run of `prior_rows`."""
REASONING_TEXT = "Grades of the training set, and its mean box for this region and side."
"""Stands in `<think>` where the declared format requires reasoning."""


@dataclass(frozen=True)
class Baselines:
    """Fitted on training examples."""

    counts: Mapping[tuple[int, str], Mapping[int, int]]
    """(question id, attribute) -> how often each grade is true."""
    mean_box: Mapping[tuple[str, Side], tuple[float, ...]]
    """(region, side) -> mean of the six half-open edges, each as a fraction of the grid along its axis."""

    def grades(self, question: Question) -> dict[str, int]:
        """The commonest grade of each attribute, the lowest of equally common ones."""
        counts = self._counts(question)
        return {name: min(found, key=lambda g: (-found[g], g)) for name, found in counts.items()}

    def drawn_grades(self, question: Question, rng: np.random.Generator) -> dict[str, int]:
        """A grade for each attribute, drawn as often as it is true in training."""
        drawn = {}
        for name, found in self._counts(question).items():
            times = np.array(list(found.values()))
            drawn[name] = int(rng.choice(list(found), p=times / times.sum()))
        return drawn

    def _counts(self, question: Question) -> dict[str, Mapping[int, int]]:
        """Of each attribute; the lowest grade of its space once, where training never graded it."""
        return {
            a.name: self.counts.get((question.question_id, a.name), {a.grades.start: 1})
            for a in question.attributes
        }

    def box(self, region: str, side: Side, shape: tuple[int, int, int]) -> Box3D | None:
        """The mean box in voxels of a grid of `shape` (slices, x, y); None for a region and side never seen."""
        edges = self.mean_box.get((region, side))
        if edges is None:
            return None
        limits: list[int] = []
        for axis, size in enumerate(shape):
            low = min(round(edges[2 * axis] * size), size - 1)
            limits += [low, max(round(edges[2 * axis + 1] * size), low + 1)]
        return Box3D(*limits)


def fit_baselines(train: Sequence[Example]) -> Baselines:
    """Fit on training examples.

    Raises:
        ValueError: no examples.
    """
    if not train:
        raise ValueError("fit_baselines needs training examples, got none")
    grades: dict[tuple[int, str], Counter[int]] = {}
    edges: dict[tuple[str, Side], list[list[float]]] = {}
    for example in train:
        for name, grade in example.truth.grades.items():
            grades.setdefault((example.question.question_id, name), Counter())[grade] += 1
        if example.truth.bbox is not None:
            box, size = example.truth.bbox, np.repeat(example.volume.shape, 2)
            key = (example.question.region, example.side)
            edges.setdefault(key, []).append((np.array(astuple(box)) / size).tolist())
    mean_box = {key: tuple(np.mean(rows, axis=0).tolist()) for key, rows in edges.items()}
    return Baselines(grades, mean_box)


def baseline_rows(
    baselines: Baselines, examples: Sequence[Example], reader: ReaderMode, reasoning: Reasoning
) -> Iterator[AnswerRow]:
    """Majority grades and the mean box as the rows of a run."""
    for example in examples:
        yield answer_row(example, baseline_completion(baselines, example, reasoning), "baseline", reader)


def prior_rows(
    baselines: Baselines, examples: Sequence[Example], reader: ReaderMode, reasoning: Reasoning, seed: int
) -> Iterator[AnswerRow]:
    """Grades drawn as often as in training, and the mean box, as the rows of a run."""
    rng = np.random.default_rng(seed)
    for example in examples:
        grades = baselines.drawn_grades(example.question, rng)
        yield answer_row(example, _completion(baselines, example, grades, reasoning), "baseline", reader)


def baseline_completion(baselines: Baselines, example: Example, reasoning: Reasoning) -> str:
    """Majority grades with the mean box, in the declared format."""
    return _completion(baselines, example, baselines.grades(example.question), reasoning)


def _completion(
    baselines: Baselines, example: Example, grades: Mapping[str, int], reasoning: Reasoning
) -> str:
    box = baselines.box(example.question.region, example.side, example.volume.shape)
    thought = REASONING_TEXT if reasoning == "required" else None
    return format_answer(example.question, grades, box, thought)
