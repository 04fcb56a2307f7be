"""Texts of the stand-in base: what its tokenizer is trained on, and the short answers it is taught."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

from rewards.boxes import Box3D
from rewards.ontology import QUESTIONS, Question
from rewards.reading import format_answer
from rewards.types import Example, Truth, VolumeRef
from rl.base.knees import KneeArrays
from rl.config import PhantomConfig
from rl.data.phantom.reasoning import reasoning_sentence
from rollouts.prompts import INSTRUCTION, SYSTEM_PROMPT, question_text, volume_header

_BOX = Box3D(3, 9, 20, 40, 30, 60)


def knee_example(arrays: KneeArrays, index: int, question_id: int, phantom: PhantomConfig) -> Example:
    """A question about a phantom in memory, as if it had been read from disk."""
    x, y, slices = phantom.shape
    fov_x, fov_y, fov_s = phantom.fov_mm
    volume = VolumeRef(f"knee{index}", "", None, (slices, x, y), (fov_s / slices, fov_x / x, fov_y / y))
    knee = arrays.knee
    return Example(
        example_id=f"knee{index}_{question_id}",
        volume=volume,
        question=QUESTIONS[question_id],
        truth=Truth(knee.grades[question_id], Box3D.from_text(arrays.boxes[question_id].tolist())),
        patient_id=str(index),
        visit=knee.visit,
        side=knee.side,
        reasoning=reasoning_sentence(QUESTIONS[question_id], knee.grades[question_id]),
    )


def short_answer(example: Example) -> str:
    """`Size of lesion 2, Depth of lesion 1. Box 3-8, 20-39, 30-59.`: not the declared format, which SFT must teach."""
    grades = ", ".join(f"{a.name} {example.truth.grades[a.name]}" for a in example.question.attributes)
    assert example.truth.bbox is not None
    s0, s1, x0, x1, y0, y1 = example.truth.bbox.to_text()
    return f"{grades}. Box {s0}-{s1}, {x0}-{x1}, {y0}-{y1}."


def tokenizer_corpus(examples: Sequence[Example]) -> Iterator[str]:
    """Every prompt, every reasoning sentence, and answers with every grade."""
    for example in examples:
        yield f"system\n{SYSTEM_PROMPT}\nuser\n{volume_header(example)}\nassistant\n"
        yield short_answer(example)
    for question in QUESTIONS.values():
        for instruction in INSTRUCTION.values():
            yield f"{question_text(question)} {instruction}"
        for grades in _all_grades(question):
            sentence = reasoning_sentence(question, grades)
            yield format_answer(question, grades, _BOX, sentence)


def _all_grades(question: Question) -> Iterator[dict[str, int]]:
    names = [a.name for a in question.attributes]
    for values in product(*(a.grades for a in question.attributes)):
        yield dict(zip(names, values, strict=True))
