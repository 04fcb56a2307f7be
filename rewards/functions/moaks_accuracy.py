"""Share of the MOAKS grades that are right."""

from __future__ import annotations

from rewards.registry import reward
from rewards.types import Answer, Truth


@reward
def moaks_accuracy(answer: Answer, truth: Truth) -> float | None:
    """`(1/K) sum_k [answered grade k = true grade k]` over the K attributes that were graded.

    Exact match on purpose: most grades are 0, and credit for a near miss makes answering 0 everywhere pay more. An
    attribute that is missing or cannot be read is wrong. None when the truth has no grades.
    """
    if not truth.grades:
        return None
    right = sum(answer.grades.get(name) == grade for name, grade in truth.grades.items())
    return right / len(truth.grades)
