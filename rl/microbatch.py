"""What is computed together, by numbers of tokens alone."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

LOGITS_AT_ONCE = 2**27
"""Most logits of completion tokens in memory (0.5 GiB). Where there are more (a real vocabulary has 150,000 entries),
they are made in parts, and made again in the backward pass."""


def scored_at_once(vocabulary: int) -> int:
    """Completion tokens whose logits are made together."""
    return max(1, LOGITS_AT_ONCE // vocabulary)


@dataclass(frozen=True, slots=True)
class GroupTokens:
    """Tokens of one question with its completions, and of the volume it is about."""

    volume: Hashable
    """Equal for questions about one volume."""
    shared: int
    """Tokens of the volume, computed once for questions that follow each other."""
    own: int
    """Tokens of the question and its completions."""


def within_budget(groups: Sequence[GroupTokens], budget: int) -> Iterator[range]:
    """Cut groups into parts of at most `budget` tokens, never a group.

    A volume's tokens count once for its groups in a part and are computed again in another: so a volume is cut only
    where it does not fit a part of its own.
    """
    start = used = i = 0
    for _, of_volume in groupby(groups, lambda group: group.volume):
        volume = list(of_volume)
        whole = volume[0].shared + sum(group.own for group in volume)
        if used and used + whole > budget:
            yield range(start, i)
            start, used = i, 0
        if used + whole <= budget:
            used, i = used + whole, i + len(volume)
            continue
        used = volume[0].shared
        for group in volume:
            if i > start and used + group.own > budget:
                yield range(start, i)
                start, used = i, group.shared
            used, i = used + group.own, i + 1
    if groups:
        yield range(start, i)


def attended_at_once(path: int, lengths: Sequence[int]) -> Iterator[range]:
    """Cut siblings into runs whose attention is one call: together at most half as long as their path, or one alone.

    The keys of a run are the path's and its own, of which those of the others are computed to be masked. Each run costs
    a copy of the path's keys.

    Args:
        path: tokens before them.
        lengths: tokens of each.
    """
    siblings = [GroupTokens(volume=None, shared=0, own=length) for length in lengths]
    return within_budget(siblings, path // 2)
