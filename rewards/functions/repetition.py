"""The same words over and over."""

from __future__ import annotations

from rewards.registry import reward


@reward(kind="penalty")
def repetition(completion: str, *, words: int = 8) -> float:
    """Share of the runs of `words` words that were said before: `1 - distinct runs / runs`, case ignored.

    The n-gram form of Yeo et al. 2025 (arXiv 2502.03373, appendix), over the text before `<answer>`: the answer says
    again what was reasoned. 0 when there are fewer words than that; text that goes round in circles approaches 1.
    """
    if words < 1:
        raise ValueError(f"words must be at least 1, got {words}")
    said = completion.partition("<answer>")[0].lower().split()
    runs = len(said) - words + 1
    if runs <= 0:
        return 0.0
    distinct = len(set(zip(*(said[i:] for i in range(words)), strict=False)))
    return 1 - distinct / runs
