"""The red team: shipped suites withstand it, formulas known to be broken do not."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import rewards.redteam
from rewards import Component, RewardSuite, box_iou, read_answer
from rewards.redteam import EXPLOITS, PRIORS, RedTeamReport, cases, honest_answer, red_team
from rewards.redteam.exploits import FAMILIES
from rewards.types import ReaderMode, Reasoning

EXHIBITS = Path(rewards.redteam.__file__).parent / "exhibits.py"
DEFAULT = [Component("output_format", 0.2), Component("moaks_accuracy"), Component("box_iou")]
EVERYTHING = [
    *DEFAULT,
    Component("box_giou", 0.5, gate="output_format"),
    Component("box_iou_threshold", 0.5),
    Component("box_size_validity", 0.2),
    Component("rule_violations", -0.2),
    Component("soft_overlong", -0.1),
    Component("repetition", -0.1),
]


@pytest.fixture(scope="module")
def report() -> RedTeamReport:
    return red_team(RewardSuite(DEFAULT))


def test_sixty_mechanisms_in_every_family_have_a_name_and_a_hope() -> None:
    assert len({exploit.name for exploit in EXPLOITS}) == len(EXPLOITS) >= 60
    assert len({exploit.what for exploit in EXPLOITS}) == len(EXPLOITS)
    families = Counter(exploit.family for exploit in EXPLOITS)
    assert set(families) == set(FAMILIES)
    assert min(families.values()) >= 5


def test_exploits_are_distinct_completions_for_any_question() -> None:
    for reasoning in ("required", "none"):
        for case in cases("balanced", reasoning, knees=1)[::10]:  # type: ignore[arg-type]
            texts = [exploit.attack(case) for exploit in EXPLOITS]
            assert all(isinstance(text, str) for text in texts)
            assert (
                len(set(texts)) >= len(texts) - 1
            )  # without reasoning, dots and blanks differ only in the think part


def test_no_exploit_beats_the_default_suite(report: RedTeamReport) -> None:
    assert report.problems == []


def test_honest_answers_earn_what_they_are_worth(report: RedTeamReport) -> None:
    means = [earned.mean for earned in report.honest.values()]
    assert means == sorted(means)
    assert means[-1] == 1.0
    assert report.honest[0.6, 0.3].mean == pytest.approx((0.2 + 0.6 + 0.3) / 2.2, abs=0.06)


def test_findings_are_ranked_worst_first(report: RedTeamReport) -> None:
    means = [finding.earned.mean for finding in report.findings]
    assert means == sorted(means, reverse=True)


def test_priors_pay_more_on_the_natural_mix_and_a_mean_box_more_than_the_middle(
    report: RedTeamReport,
) -> None:
    assert set(report.priors) == set(PRIORS)
    for name in ("constant_zero", "train_majority", "train_majority_and_mean_box"):
        assert report.priors[name]["natural"].mean > report.priors[name]["balanced"].mean
    assert (
        report.priors["train_majority_and_mean_box"]["natural"].mean
        > report.priors["train_majority"]["natural"].mean
    )


def test_an_honest_answer_has_the_quality_that_was_asked_for() -> None:
    rng = np.random.default_rng(0)
    right, overlaps = [], []
    for case in cases("natural", knees=4):
        answer = read_answer(
            honest_answer(case, 0.6, 0.3, rng), case.example.question, shape=case.example.volume.shape
        )
        assert answer.ok
        right += [answer.grades[name] == grade for name, grade in case.example.truth.grades.items()]
        overlaps.append(box_iou(answer, case.example.truth))
    assert np.mean(right) == pytest.approx(0.6, abs=0.05)
    assert np.mean(overlaps) == pytest.approx(0.3, abs=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["strict", "tolerant"])
@pytest.mark.parametrize("reasoning", ["required", "none"])
def test_no_exploit_beats_all_shipped_rewards_together(mode: ReaderMode, reasoning: Reasoning) -> None:
    for components in (DEFAULT, EVERYTHING):
        assert red_team(RewardSuite(components, reader=mode, reasoning=reasoning)).problems == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("exhibit", "found"),
    [
        ("signed_giou", "one_voxel"),
        ("open_ended_iou", "thin_sheet"),
        ("box_recall", "whole_volume"),
        ("substring_match", "silence"),
        ("any_listed_grade", "list_of_grades"),
        ("best_of_all_answers", "contradicting_answers"),
        ("paid_per_answer", "same_answer_twice"),
        ("unanswered_is_not_wrong", "empty_tags"),
        ("unguarded_json", "opening_bracket"),
    ],
)
def test_a_formula_known_to_be_broken_is_found(exhibit: str, found: str) -> None:
    problems = red_team(RewardSuite([Component(f"{EXHIBITS}:{exhibit}")])).problems
    assert any(problem.startswith(f"{found}: ") for problem in problems), problems[:5]
