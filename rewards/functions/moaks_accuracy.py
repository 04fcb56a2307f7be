"""Share of the MOAKS grades that are right."""

from __future__ import annotations

from rewards.ontology import Question
from rewards.registry import reward
from rewards.types import Answer, Truth


@reward(about="grades")
def moaks_accuracy(
    answer: Answer, truth: Truth, question: Question, *, ordinal_credit: bool = False
) -> float | None:
    """`(1/K) sum_k credit_k` over the K attributes that were graded; credit is 1 for the true grade, else 0.

    An attribute that is missing or cannot be read earns nothing. None when the truth has no grades.

    With `ordinal_credit` a near miss on an *ordinal* attribute earns `1 - |answered - true| / (grades - 1)`; nominal
    and binary ones stay exact. Off on purpose: most grades are 0, and credit for a near miss makes answering 0
    everywhere pay more (on cartilage size .83 instead of .73).
    """
    if not truth.grades:
        return None
    earned = 0.0
    for name, grade in truth.grades.items():
        answered = answer.grades.get(name)
        if answered == grade:
            earned += 1
        elif ordinal_credit and answered is not None:
            attribute = question.attribute(name)
            if attribute.scale == "ordinal":
                earned += 1 - abs(answered - grade) / (len(attribute.grades) - 1)
    return earned / len(truth.grades)
