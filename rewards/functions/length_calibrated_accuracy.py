"""Right grades, worth a little more when said in fewer words than the rest of the group."""

from __future__ import annotations

from collections.abc import Sequence

from rewards.registry import group_reward
from rewards.types import Answer, Truth


@group_reward
def length_calibrated_accuracy(
    answers: Sequence[Answer], completions: Sequence[str], truth: Truth, *, discount: float = 0.25
) -> list[float] | None:
    """`a_g (1 - discount (l_g - min l) / (max l - min l))`: share of right grades `a_g`, length `l_g` in characters.

    The length reward of Kimi k1.5 (arXiv 2501.12599, section 2.3.3) as a factor: being short earns nothing by itself.
    No question has more than three attributes, so with a `discount` below 1/3 the shortest answer never beats one with
    more right grades. None when the truth has no grades.
    """
    if not 0 <= discount < 1:
        raise ValueError(f"discount must be in [0, 1), got {discount}")
    if not truth.grades:
        return None
    shortest, longest = min(map(len, completions)), max(map(len, completions))
    scores = []
    for answer, completion in zip(answers, completions, strict=True):
        right = sum(answer.grades.get(name) == grade for name, grade in truth.grades.items())
        excess = (len(completion) - shortest) / max(1, longest - shortest)
        scores.append(right / len(truth.grades) * (1 - discount * excess))
    return scores
