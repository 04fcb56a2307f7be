"""Sampled knees: MOAKS rules, grade frequencies, follow-up."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards.ontology import QUESTIONS
from rewards.types import Side
from rl.data.phantom.anatomy import (
    DEPTH_OF_DEFECT,
    NUMBER_OF_BML,
    SHARE_OF_BML,
    SIZE_OF_BML,
    SIZE_OF_DEFECT,
    Knee,
    Mode,
    follow_up,
    sample_knee,
)

SEEDS = st.integers(0, 2**32 - 1)
MODES: tuple[Mode, ...] = ("natural", "balanced")
SIDES: tuple[Side, ...] = ("right", "left")


def assert_moaks_rules(knee: Knee) -> None:
    assert set(knee.grades) == set(QUESTIONS)
    for question_id, question in QUESTIONS.items():
        grades = knee.grades[question_id]
        assert list(grades) == [a.name for a in question.attributes]
        assert all(type(g) is int and g in question.attribute(n).grades for n, g in grades.items())
        if question.category == "BML":
            lesion = grades[SIZE_OF_BML] > 0
            assert (grades[NUMBER_OF_BML] > 0) == lesion
            assert (grades[SHARE_OF_BML] > 0) == lesion
        if question.category == "Cartilage" and grades[SIZE_OF_DEFECT] == 0:
            assert grades[DEPTH_OF_DEFECT] == 0
        if "morphology" in grades and knee.visit == "00M":
            assert grades["morphology"] != 7
        if grades.get("presence") == 0 and "tear_location" in grades:
            assert grades["tear_location"] == 3


@given(seed=SEEDS, side=st.sampled_from(SIDES), mode=st.sampled_from(MODES))
def test_every_visit_of_a_knee_obeys_the_moaks_rules(seed: int, side: Side, mode: Mode) -> None:
    rng = np.random.default_rng(seed)
    knee = sample_knee(rng, side, mode=mode)
    assert_moaks_rules(knee)
    for visit in ("12M", "24M", "48M"):
        knee = follow_up(knee, rng, visit)
        assert_moaks_rules(knee)


@given(seed=SEEDS, mode=st.sampled_from(MODES))
def test_a_follow_up_keeps_the_anatomy_and_never_improves_a_grade(seed: int, mode: Mode) -> None:
    rng = np.random.default_rng(seed)
    knee = sample_knee(rng, "right", mode=mode)
    later = follow_up(knee, rng, "24M")
    assert (later.anatomy_seed, later.scale, later.side) == (knee.anatomy_seed, knee.scale, knee.side)
    assert later.visit == "24M"
    for question_id, grades in knee.grades.items():
        for name, grade in grades.items():
            if name not in ("morphology", "tear_location"):
                assert later.grades[question_id][name] >= grade


@lru_cache
def many_knees(mode: Mode) -> list[Knee]:
    rng = np.random.default_rng(0)
    return [sample_knee(rng, "right", "12M", mode) for _ in range(600)]


def grade_shares(mode: Mode, question_id: int, name: str) -> np.ndarray:
    grades = [knee.grades[question_id][name] for knee in many_knees(mode)]
    return np.bincount(grades, minlength=len(QUESTIONS[question_id].attribute(name).grades)) / len(grades)


def test_natural_cartilage_sizes_have_the_frequencies_of_the_real_data() -> None:
    assert grade_shares("natural", 19, SIZE_OF_DEFECT) == pytest.approx(
        [0.726, 0.053, 0.197, 0.024], abs=0.06
    )


@pytest.mark.parametrize(
    ("question_id", "name"),
    [
        (4, SIZE_OF_BML),
        (4, NUMBER_OF_BML),
        (4, SHARE_OF_BML),
        (19, SIZE_OF_DEFECT),
        (30, "grade"),
        (50, "morphology"),
    ],
)
def test_balanced_grades_are_about_equally_frequent(question_id: int, name: str) -> None:
    shares = grade_shares("balanced", question_id, name)
    assert shares.min() > 0.6 / len(shares)
    assert shares.max() < 1.5 / len(shares)
