"""Synthetic benchmark runs: patients with visits, truths drawn per patient, and models of a chosen skill."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest

from rewards.boxes import Box3D
from rewards.ontology import QUESTIONS
from rewards.reading import format_answer
from rewards.types import Example, Truth, VolumeRef
from rl.bench.answers import BenchRun, answer_row, make_run
from rl.bench.meta import RunMeta

SHAPE = (16, 48, 40)


def make_examples(
    patients: int, question_ids: Sequence[int] = range(1, 63), visits: int = 2, seed: int = 0
) -> list[Example]:
    """Truths with most grades 0, boxes near a place of their region."""
    rng = np.random.default_rng(seed)
    examples = []
    for patient in range(patients):
        for visit in range(visits):
            volume = VolumeRef(f"p{patient:03d}_{visit}_s_s_1", "none.nii.gz", None, SHAPE, (4.0, 1.5, 1.5))
            for question_id in question_ids:
                question = QUESTIONS[question_id]
                truth = Truth(
                    {a.name: int(rng.choice(a.grades, p=_skew(len(a.grades)))) for a in question.attributes},
                    _box(rng, question_id),
                )
                examples.append(
                    Example(
                        example_id=f"{volume.volume_id}_{question_id}",
                        volume=volume,
                        question=question,
                        truth=truth,
                        patient_id=f"p{patient:03d}",
                        visit=f"{12 * visit:02d}M",
                        side="right" if patient % 2 else "left",
                    )
                )
    return examples


def _skew(k: int) -> np.ndarray:
    weights = 0.5 ** np.arange(k)
    return weights / weights.sum()


def _box(rng: np.random.Generator, question_id: int) -> Box3D:
    place = np.array([question_id % 8, (question_id * 7) % 30, (question_id * 5) % 24])
    low = place + rng.integers(0, 3, 3)
    high = low + rng.integers(4, 8, 3)
    return Box3D(low[0].item(), high[0].item(), low[1].item(), high[1].item(), low[2].item(), high[2].item())


def answer_all(
    examples: Sequence[Example],
    name: str,
    skill: float,
    seed: int = 0,
    patient_sd: float = 0.0,
    broken: float = 0.0,
) -> BenchRun:
    """A model that gives the true grade with probability `skill` (else 0), shifts boxes less the better it is.

    Args:
        patient_sd: spread of the skill between patients, which makes answers about one patient alike.
        broken: share of completions that cannot be read.
    """
    rng = np.random.default_rng([seed, 7])
    of_patient: dict[str, float] = {}
    rows = []
    for example in examples:
        own = of_patient.setdefault(
            example.patient_id, float(np.clip(skill + patient_sd * rng.normal(), 0, 1))
        )
        grades = {n: g if rng.random() < own else 0 for n, g in example.truth.grades.items()}
        shift = 0 if rng.random() < own else int(rng.integers(1, 4))
        assert example.truth.bbox is not None
        s0, s1, x0, x1, y0, y1 = example.truth.bbox.to_text()
        box = Box3D.from_text([s0, s1, x0 + shift, x1 + shift, y0, y1])
        completion = format_answer(
            example.question, grades, box, f"The {example.question.region} was looked at."
        )
        if rng.random() < broken:
            completion = completion[: len(completion) // 2]
        rows.append(answer_row(example, completion, "stop", "strict"))
    return make_run(rows, make_meta(name, sorted({e.question.question_id for e in examples})))


def make_meta(name: str, question_ids: Sequence[int] = range(1, 63)) -> RunMeta:
    return RunMeta(
        name=name,
        model="builtin:base",
        adapter=None,
        split_file="test.json",
        question_ids=tuple(question_ids),
        reader="strict",
        reasoning="required",
        decoding={"temperature": 0.0, "top_p": 1.0, "max_tokens": 128},
        config_hash="c0",
        dataset_fingerprint="d0",
        n=0,
    )


def answer_cut_out(examples: Sequence[Example], name: str) -> BenchRun:
    """A model that is shown the true regions alone, grades rightly and gives back all it was shown as its box."""
    rows = []
    for example in examples:
        assert example.truth.bbox is not None
        everything = Box3D.from_corners((0, 0, 0), example.truth.bbox.extents)
        completion = format_answer(example.question, example.truth.grades, everything, "All of it.")
        rows.append(answer_row(example, completion, "stop", "strict"))
    meta = make_meta(name, sorted({e.question.question_id for e in examples}))
    return make_run(rows, replace(meta, image="true_region"))


@pytest.fixture(scope="session")
def answered_cut_out() -> Callable[..., BenchRun]:
    return answer_cut_out


@pytest.fixture(scope="session")
def examples() -> Callable[..., list[Example]]:
    return make_examples


@pytest.fixture(scope="session")
def answered() -> Callable[..., BenchRun]:
    return answer_all


@pytest.fixture(scope="session")
def meta() -> Callable[..., RunMeta]:
    return make_meta
