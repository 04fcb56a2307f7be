"""Which tokens of a completion answer for which reward.

A group-relative advantage usually goes to every token of a completion: the six numbers of a box are praised and blamed
for the grades, the grade of one attribute for that of the next, and most of what moves each of them is noise. With
`grpo.credit: part` the text of the box and the text of each grade answer for themselves:

    <think>...</think><answer>{"bbox": [2, 5, 10, 29, 20, 49], "MOAKS_scores": {"x": {"Size": 2, "Depth": 1}}}</answer>
                               ------------ BOX -------------                         - SIZE -   - DEPTH -

BOX is credited with all rewards but those about grades; the text of an attribute with all but those about the box,
scored as if no other attribute had been graded; the rest with everything. What is neglected is the
influence of one part's text on the next part. A reward says what it is about where it is declared
(`@reward(about="bbox")`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from rewards.ontology import QUESTIONS
from rewards.types import Example, Truth

REST, BOX, FIRST_ATTRIBUTE = range(3)
"""Parts of a completion; the question's attribute j is part `FIRST_ATTRIBUTE + j`."""
MAX_ATTRIBUTES = max(len(question.attributes) for question in QUESTIONS.values())

_BOX_TEXT = re.compile(r'"bbox"\s{0,9}:\s{0,9}\[[^\]]{0,200}\]')
_GRADE_TEXT = r'"\s{0,9}:\s{0,9}[^\s,{}\[\]]{1,20}'


def token_parts(token_texts: Sequence[str], attributes: Sequence[str]) -> list[int]:
    """The part of each token.

    Args:
        token_texts: the tokens, decoded one by one.
        attributes: names of the question's attributes, in order. What is not found in the answer is part of the rest.
    """
    text = "".join(token_texts)
    answer = max(text.rfind("<answer>"), 0)
    patterns = [_BOX_TEXT, *(re.compile('"' + re.escape(name) + _GRADE_TEXT) for name in attributes)]
    found = [(part, pattern.search(text, answer)) for part, pattern in enumerate(patterns, start=BOX)]
    spans = [(part, match.start(), match.end()) for part, match in found if match]
    parts, end = [], 0
    for token in token_texts:
        start, end = end, end + len(token)
        parts.append(next((part for part, first, last in spans if start < last and end > first), REST))
    return parts


def graded_alone(example: Example, attribute: int) -> Example:
    """The example as if one attribute were the only graded one; itself when that changes nothing.

    So also where the attribute has no true grade: no token answers for it then.
    """
    attributes, grades = example.question.attributes, example.truth.grades
    name = attributes[attribute].name if attribute < len(attributes) else ""
    if name not in grades or len(grades) == 1:
        return example
    return replace(example, truth=Truth({name: grades[name]}, example.truth.bbox))
