"""Which of the 69 questions a text asks, told by the JSON template in it.

The wording of a question differs from file to file; the entity key of its template (`"patella medial BML": {`)
does not, and no two questions share one. Only quoted keys count, so other findings may be named in prose.
"""

from __future__ import annotations

import re

from rewards.keys import ENTITIES, normalise
from rewards.ontology import QUESTIONS, Question

_QUOTED_KEY = re.compile(r'"([^"\n]{1,120})"\s{0,8}:')


def match_question(text: str) -> Question:
    """The question whose answer template the text contains; the template may be irregular or unbalanced.

    Raises:
        ValueError: no template of the 69 questions, or those of several (they are named).
    """
    # the released files write some keys as entity.attribute
    keys = (match[1].partition(".")[0] for match in _QUOTED_KEY.finditer(text))
    candidates = {ENTITIES[key] for key in map(normalise, keys) if key in ENTITIES}
    if len(candidates) == 1:
        return QUESTIONS[candidates.pop()]
    if not candidates:
        raise ValueError(f"no answer template of a known question in {text[:200]!r}")
    names = ", ".join(f"{number} ({QUESTIONS[number].entity!r})" for number in sorted(candidates))
    raise ValueError(f"the text holds the answer templates of several questions: {names}")
