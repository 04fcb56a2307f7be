"""Prompt sampling: balanced where asked for, reproducible, volume by volume."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl.data.sampling import PromptSampler, draw_distinct

VOLUMES, QUESTIONS = 400, 6
SHARES = [0.8, 0.1, 0.06, 0.04]


def natural_set(seed: int = 0) -> tuple[list[int], list[dict[str, int]], list[str]]:
    """400 volumes, 6 questions about each; the first has a skewed grade, the others are evenly graded."""
    rng = np.random.default_rng(seed)
    question_ids, grades, volume_ids = [], [], []
    for volume in range(VOLUMES):
        for question in range(QUESTIONS):
            skewed = int(rng.choice(4, p=SHARES)) if question < 3 else int(rng.integers(2))
            question_ids.append(question)
            grades.append({"size": skewed})
            volume_ids.append(f"v{volume}")
    return question_ids, grades, volume_ids


def drawn_grades(*, balance: bool, steps: int = 400) -> Counter[int]:
    question_ids, grades, volume_ids = natural_set()
    sampler = PromptSampler(question_ids, grades, volume_ids, balance=balance, seed=3)
    drawn = (i for step in range(steps) for questions in sampler.draw(step, 8, 2) for i in questions)
    return Counter(grades[i]["size"] for i in drawn if question_ids[i] < 3)


def test_balanced_draws_make_rare_grades_as_frequent_as_common_ones() -> None:
    counts = drawn_grades(balance=True)
    shares = np.array([counts[g] for g in range(4)]) / counts.total()
    # a question is drawn once at most, so a volume of rare grades cannot take its full share
    assert shares == pytest.approx(0.25, abs=0.04)


def test_all_attributes_of_a_question_are_balanced_at_once() -> None:
    """A lesion of size 0 has depth 0, and depth follows size: what balances one attribute unbalances the other."""
    rng = np.random.default_rng(0)
    sizes = rng.choice(4, p=[0.7, 0.1, 0.15, 0.05], size=2000)
    depths = np.where(sizes == 0, 0, rng.choice([1, 2, 3], p=[0.2, 0.6, 0.2], size=2000))
    grades = [{"size": int(size), "depth": int(depth)} for size, depth in zip(sizes, depths, strict=True)]
    sampler = PromptSampler([1] * 2000, grades, [f"v{i}" for i in range(2000)], balance=True, seed=0)
    for values in (sizes, depths):
        assert np.bincount(values, sampler.weights) == pytest.approx(0.25, abs=1e-3)


def test_attributes_that_cannot_both_be_balanced_end_at_a_compromise() -> None:
    grades = [{"a": 0, "b": 0}, {"a": 0, "b": 1}, {"a": 1, "b": 1}]
    sampler = PromptSampler([1] * 3, grades, ["x", "y", "z"], balance=True, seed=0)
    assert sampler.weights.sum() == pytest.approx(1)
    assert sampler.weights[0] == pytest.approx(sampler.weights[2], abs=0.02)


@given(st.lists(st.floats(0.01, 1), min_size=2, max_size=12), st.integers(1, 12))
def test_distinct_draws_are_as_many_as_asked_for(weights: list[float], count: int) -> None:
    drawn = draw_distinct(np.random.default_rng(0), np.array([*weights, 0.0]), count)
    assert len(set(drawn.tolist())) == len(drawn) == min(count, len(weights))
    assert len(weights) not in drawn  # its weight is 0


def test_distinct_draws_include_each_in_proportion_to_its_weight() -> None:
    """One after another, without going back, the heaviest would be drawn in .86 of the draws instead of in all."""
    weights = np.array([6.0, 3.0, 1.0, 1.0, 1.0])
    rng = np.random.default_rng(0)
    times = np.zeros(5)
    for _ in range(4000):
        times[draw_distinct(rng, weights, 2)] += 1
    assert times / 4000 == pytest.approx([1, 1 / 2, 1 / 6, 1 / 6, 1 / 6], abs=0.03)


def test_unbalanced_draws_follow_the_data() -> None:
    counts = drawn_grades(balance=False)
    shares = np.array([counts[g] for g in range(4)]) / counts.total()
    assert shares == pytest.approx(SHARES, abs=0.03)


def test_questions_stay_equally_frequent_when_grades_are_balanced() -> None:
    question_ids, grades, volume_ids = natural_set()
    sampler = PromptSampler(question_ids, grades, volume_ids, balance=True, seed=3)
    counts = Counter(question_ids[i] for step in range(400) for qs in sampler.draw(step, 8, 2) for i in qs)
    shares = np.array([counts[q] for q in range(QUESTIONS)]) / counts.total()
    assert shares == pytest.approx(1 / QUESTIONS, abs=0.04)


def test_a_draw_is_a_pure_function_of_seed_and_step() -> None:
    def sampler(seed: int) -> PromptSampler:
        return PromptSampler(*natural_set(), balance=True, seed=seed)

    first = sampler(0)
    assert first.draw(7, 4, 3) == sampler(0).draw(7, 4, 3)
    first.draw(8, 4, 3)
    assert first.draw(7, 4, 3) == sampler(0).draw(7, 4, 3)
    assert first.draw(7, 4, 3) != first.draw(8, 4, 3)
    assert first.draw(7, 4, 3) != sampler(1).draw(7, 4, 3)


def test_questions_of_a_volume_come_together_and_nothing_comes_twice() -> None:
    question_ids, grades, volume_ids = natural_set()
    sampler = PromptSampler(question_ids, grades, volume_ids, balance=True, seed=0)
    for step in range(50):
        drawn = sampler.draw(step, 8, 4)
        assert [len(questions) for questions in drawn] == [4] * 8
        assert all(len({volume_ids[i] for i in questions}) == 1 for questions in drawn)
        assert len({volume_ids[questions[0]] for questions in drawn}) == 8
        assert len({i for questions in drawn for i in questions}) == 32


def test_more_than_there_is_gives_all_there_is_once() -> None:
    sampler = PromptSampler([1, 2, 1], [{"a": 0}, {"b": 1}, {"a": 1}], ["x", "x", "y"], balance=True, seed=0)
    drawn = sampler.draw(0, 10, 10)
    assert sorted(i for questions in drawn for i in questions) == [0, 1, 2]


def test_an_example_without_grades_is_never_drawn_when_balancing() -> None:
    examples = ([1, 1, 2], [{"a": 0}, {"a": 1}, {}], ["x", "y", "z"])
    balanced = PromptSampler(*examples, balance=True, seed=0)
    assert {i for step in range(20) for qs in balanced.draw(step, 3, 1) for i in qs} == {0, 1}
    natural = PromptSampler(*examples, balance=False, seed=0)
    assert {i for step in range(20) for qs in natural.draw(step, 3, 1) for i in qs} == {0, 1, 2}


def test_nothing_to_draw_from_is_refused() -> None:
    with pytest.raises(ValueError, match="no example to draw from"):
        PromptSampler([], [], [], balance=True, seed=0)
    with pytest.raises(ValueError, match="no example to draw from"):
        PromptSampler([1], [{}], ["x"], balance=True, seed=0)
