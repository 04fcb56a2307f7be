"""The assertions and fixtures that users test their rewards with: they pass for sound rewards and fail for others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import rewards.registry as registry
from rewards import (
    Answer,
    Component,
    Example,
    Question,
    RewardSuite,
    Truth,
    box_iou,
    iou,
    read_answer,
    reward,
)
from rewards.testing import (
    assert_bounded,
    assert_deterministic,
    assert_gold_scores_full,
    assert_monotone,
    assert_never_raises,
    assert_not_exploitable,
)

pytestmark = pytest.mark.usefixtures("own_registry")
EXHIBITS = Path(registry.__file__).parent / "redteam" / "exhibits.py"
SHIPPED = ("output_format", "moaks_accuracy", "box_iou", "box_giou", "box_iou_threshold", "box_size_validity")
GROUP = ("difficulty_calibrated_accuracy", "length_calibrated_accuracy")
PENALTIES = ("rule_violations", "soft_overlong", "repetition")


@pytest.mark.parametrize("name", [*SHIPPED, *GROUP, *PENALTIES, "answer_matches_reasoning"])
def test_shipped_rewards_pay_the_true_answer_in_full_and_keep_the_contract(name: str) -> None:
    assert_gold_scores_full(name)
    assert_bounded(name)
    assert_never_raises(name)
    assert_deterministic(name)


def test_better_answers_earn_more() -> None:
    assert_monotone("moaks_accuracy", "accuracy")
    assert_monotone("moaks_accuracy", "accuracy", ordinal_credit=True)
    assert_monotone("difficulty_calibrated_accuracy", "accuracy")
    assert_monotone("length_calibrated_accuracy", "accuracy")
    assert_monotone(box_iou, "iou")
    assert_monotone("box_giou", "iou")
    assert_monotone("box_iou_threshold", "iou", threshold=0.5)
    suite = RewardSuite([Component("output_format", 0.2), Component("moaks_accuracy"), Component("box_iou")])
    assert_monotone(suite, "accuracy")
    assert_monotone(suite, "iou")
    with pytest.raises(AssertionError, match="iou makes no difference"):
        assert_monotone("moaks_accuracy", "iou")


def test_a_reward_that_breaks_a_promise_fails_the_assertion_that_states_it() -> None:
    calls: list[str] = []

    @reward
    def counts_its_calls(completion: str) -> float:
        calls.append(completion)
        return len(calls) % 2 / 2

    @reward
    def out_of_bounds(completion: str) -> float:
        return len(completion) / 100

    @reward
    def none_for_a_bad_answer(answer: Answer, truth: Truth) -> float | None:
        return None if answer.bbox is None or truth.bbox is None else iou(answer.bbox, truth.bbox)

    @reward
    def falls(answer: Answer, truth: Truth) -> float:
        return 1.0 if answer.bbox is None or truth.bbox is None else 1 - iou(answer.bbox, truth.bbox)

    with pytest.raises(AssertionError, match=r"scores 0(\.5)? and then 0(\.5)?"):
        assert_deterministic(counts_its_calls)
    with pytest.raises(AssertionError, match=r"must be a number in \[0, 1\]"):
        assert_bounded(out_of_bounds)
    with pytest.raises(AssertionError, match="returned None for 1 of 2"):
        assert_bounded(none_for_a_bad_answer)
    with pytest.raises(AssertionError, match=r"unguarded_json' raised .*completion"):
        assert_never_raises(f"{EXHIBITS}:unguarded_json")
    assert_bounded(f"{EXHIBITS}:unguarded_json")
    with pytest.raises(AssertionError, match=r"scores 0, not 1: question 1, "):
        assert_gold_scores_full(falls)
    with pytest.raises(AssertionError, match=r"a higher iou scores less: 0: 1.000, "):
        assert_monotone(falls, "iou")
    with pytest.raises(AssertionError, match=r"whole_volume: earns 1.000"):
        assert_not_exploitable(f"{EXHIBITS}:box_recall")


def test_what_is_no_reward_is_refused() -> None:
    def plain(answer: Answer) -> float:
        return 1.0

    with pytest.raises(ValueError, match="plain is not a reward yet; put @reward above it"):
        assert_bounded(plain)
    suite = RewardSuite([Component("box_iou")])
    with pytest.raises(TypeError, match=r"parameters \['threshold'\] are for a function"):
        assert_bounded(suite, threshold=0.5)


def test_the_fixtures_hand_out_a_question_its_truth_and_answers_of_falling_quality(
    knee_question: Question,
    knee_example: Example,
    gold_answer: Answer,
    perturbed_answers: list[tuple[float, float, str]],
) -> None:
    assert knee_example.question is knee_question
    assert gold_answer.ok
    assert gold_answer.grades == knee_example.truth.grades
    assert box_iou(gold_answer, knee_example.truth) == 1.0
    overlaps: list[Any] = []
    for _, _, completion in perturbed_answers:
        answer = read_answer(completion, knee_question)
        assert answer.ok
        overlaps.append(box_iou(answer, knee_example.truth))
    assert overlaps == sorted(overlaps, reverse=True)
    assert overlaps[0] == 1.0
    assert overlaps[-1] == 0.0
