"""Which tokens of a completion answer for which reward.

A group-relative advantage usually goes to every token of a completion, so the six numbers of a box are also praised
and blamed for the grades, and most of what moves them is noise. With `grpo.credit: part` the text of the box is its
own part:

    <think> ... </think><answer>{"bbox": [2, 5, 10, 29, 20, 49], "MOAKS_scores": {...}}</answer>
    |--------- BEFORE -----------|------------ BOX ------------|---------- AFTER ---------|

BEFORE is credited with all rewards; BOX with all but those about grades; AFTER with all but those about the box, which
it comes too late to change. What is neglected is the influence of the box's own text on the grades. A reward says what
it is about where it is declared (`@reward(about="bbox")`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

BEFORE, BOX, AFTER = range(3)
NOT_CREDITED = ("", "grades", "bbox")
"""For each part, what the rewards are about that it does not answer for."""

_BOX_TEXT = re.compile(r'"bbox"\s{0,9}:\s{0,9}\[[^\]]{0,200}\]')


def token_parts(token_texts: Sequence[str]) -> list[int]:
    """The part of each token; all BEFORE in a completion whose answer has no box that can be found."""
    text = "".join(token_texts)
    found = _BOX_TEXT.search(text, max(text.rfind("<answer>"), 0))
    parts, end = [], 0
    for token in token_texts:
        start, end = end, end + len(token)
        if found is None or end <= found.start():
            parts.append(BEFORE)
        else:
            parts.append(BOX if start < found.end() else AFTER)
    return parts
