"""A gentle limit on length."""

from __future__ import annotations

from rewards.registry import reward


@reward(kind="penalty")
def soft_overlong(completion: str, *, max_chars: int = 2000, cache_chars: int = 500) -> float:
    """Rises linearly from 0 at `max_chars - cache_chars` to 1 at `max_chars` characters.

    DAPO's soft overlong punishment (Yu et al. 2025, arXiv 2503.14476, eq. 13) in characters, sign taken by the
    component's negative weight.
    """
    excess = len(completion) - (max_chars - cache_chars)
    return min(1.0, max(0.0, excess / cache_chars)) if cache_chars > 0 else float(excess > 0)
