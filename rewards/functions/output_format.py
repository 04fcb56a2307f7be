"""Was the declared format kept?"""

from __future__ import annotations

from rewards.registry import reward
from rewards.types import Answer


@reward
def output_format(answer: Answer) -> float:
    """1 when the completion keeps the declared format to the letter, else 0.

    The format is the strict reader's (`rewards.reading`), in the declared reasoning mode, whichever mode the answer
    was read in. Wrong values in the right shape (a grade of 7, an inverted box) are the other rewards' business.
    """
    return float(answer.strict)
