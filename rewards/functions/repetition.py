"""The same words over and over."""

from __future__ import annotations

from rewards.registry import reward


@reward(kind="penalty")
def repetition(completion: str, *, words: int = 4) -> float:
    """Share of the runs of `words` words that were said before: `1 - distinct runs / runs`, case ignored.

    The n-gram form of Yeo et al. 2025 (arXiv 2502.03373, appendix). 0 when there are fewer words than that. An answer
    that is said once has no run twice; text that goes round in circles approaches 1.
    """
    if words < 1:
        raise ValueError(f"words must be at least 1, got {words}")
    said = completion.lower().split()
    runs = len(said) - words + 1
    if runs <= 0:
        return 0.0
    distinct = len(set(zip(*(said[i:] for i in range(words)), strict=False)))
    return 1 - distinct / runs
