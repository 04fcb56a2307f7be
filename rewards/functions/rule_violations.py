"""Grades that contradict each other under the rules of MOAKS."""

from __future__ import annotations

from rewards.ontology import Question
from rewards.registry import reward
from rewards.types import Answer, Example, Problem

_ZERO_IMPLIES_ZERO = {
    "BML": (
        ("Size of BML (including cyst)", "Number of BML within subregion"),
        ("Size of BML (including cyst)", "% of lesion that is BML (excluding cyst)"),
    ),
    "Cartilage": (("Size of lesion", "Depth of lesion"),),
}
"""Category -> pairs in which grade 0 of the first requires grade 0 of the second."""
_PROGRESSIVE_MACERATION = 7
_BASELINE_VISIT = "00M"


@reward(kind="penalty", about="grades")
def rule_violations(answer: Answer, question: Question, example: Example) -> float:
    """Share of the certain rules that the grades violate; 1 when any grade is missing or cannot be read.

    Rules (MOAKS, Hunter et al. 2011): a lesion of size 0 has number, percentage and depth 0; morphology grade 7
    (progressive maceration) needs an earlier visit. A penalty and never a bonus: grade 0 everywhere keeps them all.
    """
    if answer.grades_problem is not Problem.NONE:
        return 1.0
    violations = [
        answer.grades[first] == 0 and answer.grades[second] != 0
        for first, second in _ZERO_IMPLIES_ZERO.get(question.category, ())
    ]
    if "morphology" in answer.grades:
        too_early = example.visit == _BASELINE_VISIT
        violations.append(too_early and answer.grades["morphology"] == _PROGRESSIVE_MACERATION)
    return sum(violations) / len(violations) if violations else 0.0
