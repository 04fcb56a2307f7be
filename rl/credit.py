"""Which tokens of a completion answer for which reward.

A group-relative advantage usually goes to every token of a completion: the six numbers of a box are praised and blamed
for the grades and for each other, the grade of one attribute for that of the next, and most of what moves each of them
is noise. With `grpo.credit: part` each number of the box and the text of each grade answer for themselves:

    <think>...</think><answer>{"bbox": [2, 5, 10, 29, 20, 49], "MOAKS_scores": {"x": {"Size": 2, "Depth": 1}}}</answer>
                                        -- -- --- --- --- ---                         - SIZE -   - DEPTH -

A number of the box is credited with all rewards but those about grades, scored as if the other five numbers were
right; the text of an attribute with all but those about the box, scored as if no other attribute had been graded; the
rest with everything. What is neglected is the influence of one part's text on the next part. A reward says what it is
about where it is declared (`@reward(about="bbox")`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from rewards.boxes import Box3D
from rewards.ontology import QUESTIONS
from rewards.types import Example, Truth

COORDINATES = 6
REST, FIRST_COORDINATE = 0, 1
FIRST_ATTRIBUTE = FIRST_COORDINATE + COORDINATES
"""Parts of a completion: number i of the box is part `FIRST_COORDINATE + i`, the question's attribute j is part
`FIRST_ATTRIBUTE + j`."""
MAX_ATTRIBUTES = max(len(question.attributes) for question in QUESTIONS.values())

_NUMBER = r"\s{0,9}(-?\d{1,9})\s{0,9}"
_BOX_TEXT = re.compile(r'"bbox"\s{0,9}:\s{0,9}\[' + ",".join([_NUMBER] * COORDINATES) + r"\]")
_GRADE_TEXT = r'"\s{0,9}:\s{0,9}[^\s,{}\[\]]{1,20}'


def token_parts(token_texts: Sequence[str], attributes: Sequence[str]) -> list[int]:
    """The part of each token.

    Args:
        token_texts: the tokens, decoded one by one.
        attributes: names of the question's attributes, in order. What is not found in the answer is part of the rest.
    """
    text = "".join(token_texts)
    spans = []
    if box := _box(text):
        # with the character that ends it: 4 and 49 differ there
        spans += [(FIRST_COORDINATE + i, box.start(1 + i), box.end(1 + i) + 1) for i in range(COORDINATES)]
    for part, name in enumerate(attributes, start=FIRST_ATTRIBUTE):
        if grade := re.compile('"' + re.escape(name) + _GRADE_TEXT).search(text, _answer(text)):
            spans.append((part, grade.start(), grade.end()))
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


def placed_alone(text: str, truth: Box3D, coordinate: int) -> str:
    """The completion as if all numbers of its box but one were right; unchanged when it has no box of six numbers."""
    box = _box(text)
    if box is None:
        return text
    numbers = [str(number) for number in truth.to_text()]
    numbers[coordinate] = box[1 + coordinate]
    return f'{text[: box.start()]}"bbox": [{", ".join(numbers)}]{text[box.end() :]}'


def _answer(text: str) -> int:
    """Where the answer begins: a box or a grade that was only talked about is none."""
    return max(text.rfind("<answer>"), 0)


def _box(text: str) -> re.Match[str] | None:
    return _BOX_TEXT.search(text, _answer(text))
