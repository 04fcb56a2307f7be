"""What the red team answers: every question about knees that are drawn here, and honest answers of known quality.

Truths are drawn from a seed, not read: the red team needs no dataset. Grades follow one of two mixes. The *natural*
one is heavy on 0 as the released data are (cartilage size .73 / .05 / .20 / .02); in the *balanced* one all grades of
an attribute are equally frequent, so that no constant answer is worth much. Each question's region has a usual place,
about which its true boxes scatter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from rewards.boxes import Box3D, iou
from rewards.ontology import BENCHMARK_QUESTION_IDS, QUESTIONS, Attribute, Question
from rewards.reading import format_answer
from rewards.types import Example, Reasoning, Truth, VolumeRef

Mix = Literal["natural", "balanced"]

SHAPE = (40, 128, 128)
_SPACING_MM = (2.8, 1.1, 1.1)
_SCATTER_VOXELS = 4
_NATURAL_ZERO = 0.73
THOUGHT = "The region was looked at slice by slice"


@dataclass(frozen=True, slots=True)
class Case:
    """One question to attack: what the model is shown, and the truth, which no exploit but those on boxes may use."""

    example: Example
    reasoning: Reasoning
    """The declared format of the suite."""

    def wrap(self, body: str, thought: str = THOUGHT) -> str:
        """The declared envelope around `body`."""
        answer = f"<answer>{body}</answer>"
        return f"<think>{thought}</think>{answer}" if self.reasoning == "required" else answer

    def body(self, grade: str = "0", box: str | None = None) -> str:
        """The declared object with `grade` as the text of every grade and `box` as that of the box."""
        question = self.example.question
        grades = ", ".join(f'"{attribute.name}": {grade}' for attribute in question.attributes)
        scores = f'"MOAKS_scores": {{"{question.entity}": {{{grades}}}}}'
        return f'{{"bbox": {box or self.middle.to_text()}, {scores}}}'

    def declared(self, grades: Mapping[str, int], box: Box3D | None, thought: str = THOUGHT) -> str:
        """An answer in the declared format."""
        return format_answer(
            self.example.question, grades, box, thought if self.reasoning == "required" else None
        )

    @property
    def middle(self) -> Box3D:
        """A box that needs no look at the image: the middle of the volume."""
        return Box3D(*(bound for n in self.example.volume.shape for bound in (3 * n // 8, 5 * n // 8)))


def cases(mix: Mix, reasoning: Reasoning = "required", *, knees: int = 2, seed: int = 0) -> list[Case]:
    """The benchmark's 62 questions about `knees` knees; the same for the same seed. Usual places never change."""
    homes_rng, rng = np.random.default_rng(0), np.random.default_rng([seed, 1])
    homes = {question_id: _usual_box(homes_rng) for question_id in BENCHMARK_QUESTION_IDS}
    return [
        Case(_example(knee, question_id, homes[question_id], mix, rng), reasoning)
        for knee in range(knees)
        for question_id in BENCHMARK_QUESTION_IDS
    ]


def honest_answer(case: Case, accuracy: float, overlap: float, rng: np.random.Generator) -> str:
    """An answer in the declared format whose grades are right with probability `accuracy` and whose box has about the
    IoU `overlap` with the true one."""
    example = case.example
    grades = {
        name: grade if rng.random() < accuracy else _other(example.question.attribute(name), grade, rng)
        for name, grade in example.truth.grades.items()
    }
    thought = ", ".join(f"{name} is grade {grade}" for name, grade in grades.items())
    box = None if example.truth.bbox is None else shifted(example.truth.bbox, overlap)
    return case.declared(grades, box, thought)


def shifted(box: Box3D, overlap: float) -> Box3D:
    """The box moved along x, towards the middle, until its IoU with where it was is nearest to `overlap`."""
    towards = 1 if box.x_min + box.x_max < SHAPE[1] else -1
    moved = [
        Box3D(box.slice_min, box.slice_max, box.x_min + n, box.x_max + n, box.y_min, box.y_max)
        for n in range(0, towards * (box.x_max - box.x_min + 1), towards)
    ]
    return min(moved, key=lambda other: abs(iou(box, other) - overlap))


def _true_grades(mix: Mix, question: Question, rng: np.random.Generator) -> dict[str, int]:
    """Random grades that keep MOAKS's rule: a lesion of size 0 has number, share and depth 0."""
    grades = {
        a.name: int(rng.choice(list(a.grades), p=_frequencies(mix, len(a.grades))))
        for a in question.attributes
    }
    size = question.attributes[0].name
    absent = question.category in ("BML", "Cartilage") and grades[size] == 0
    return dict.fromkeys(grades, 0) if absent else grades


def _frequencies(mix: Mix, grades: int) -> Sequence[float]:
    if mix == "balanced":
        return [1 / grades] * grades
    return [_NATURAL_ZERO, *[(1 - _NATURAL_ZERO) / (grades - 1)] * (grades - 1)]


def _usual_box(rng: np.random.Generator) -> Box3D:
    """A box of a few slices, or of one: thin structures have thin boxes."""
    numbers = []
    for n, thinnest in zip(SHAPE, (1, SHAPE[1] // 6, SHAPE[2] // 6), strict=True):
        extent = int(rng.integers(thinnest, n // 3))
        low = int(rng.integers(_SCATTER_VOXELS, n - extent - _SCATTER_VOXELS))
        numbers += [low, low + extent]
    return Box3D(*numbers)


def _example(knee: int, question_id: int, home: Box3D, mix: Mix, rng: np.random.Generator) -> Example:
    volume = VolumeRef(f"knee{knee}_00M_s_s_1", "", None, SHAPE, _SPACING_MM)
    s, x, y = (int(n) for n in rng.integers(-_SCATTER_VOXELS, _SCATTER_VOXELS + 1, 3))
    box = Box3D(
        home.slice_min + s, home.slice_max + s, home.x_min + x, home.x_max + x, home.y_min + y, home.y_max + y
    )
    question = QUESTIONS[question_id]
    truth = Truth(_true_grades(mix, question, rng), box)
    return Example(
        f"{volume.volume_id}_{question_id}", volume, question, truth, f"knee{knee}", "12M", "right"
    )


def _other(attribute: Attribute, grade: int, rng: np.random.Generator) -> int:
    return int(rng.choice([g for g in attribute.grades if g != grade]))
