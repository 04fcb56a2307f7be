"""Right grades, worth more where the group finds them hard."""

from __future__ import annotations

from collections.abc import Sequence

from rewards.registry import group_reward
from rewards.types import Answer, Truth


@group_reward(about="grades")
def difficulty_calibrated_accuracy(answers: Sequence[Answer], truth: Truth) -> list[float] | None:
    """`sum_k d_k c_gk / sum_k d_k`: `c_gk` = [answer g has attribute k right], `d_k` = 1 + how many got k wrong.

    An attribute that everybody has right counts 1 / (1 + G) of one that nobody has. None when the truth has no grades.

    The weights are of the attributes of one question. A weight of the whole question, as in GRPO-LEAD (Zhang and Zuo
    2025, arXiv 2504.09696), multiplies all scores of a group alike and cancels when advantages are divided by the
    group's standard deviation.
    """
    if not truth.grades:
        return None
    right = {
        name: [answer.grades.get(name) == grade for answer in answers] for name, grade in truth.grades.items()
    }
    difficulty = {name: 1 + column.count(False) for name, column in right.items()}
    total = sum(difficulty.values())
    return [sum(difficulty[name] * right[name][g] for name in right) / total for g in range(len(answers))]
