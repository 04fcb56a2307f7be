"""Is what was answered what was reasoned?"""

from __future__ import annotations

import re
from functools import lru_cache

from rewards.ontology import Question
from rewards.registry import reward
from rewards.types import Answer


@reward
def answer_matches_reasoning(answer: Answer, question: Question) -> float:
    """`(1/K) sum_k [the grade stated for attribute k in the reasoning = its answered grade]` over the K attributes.

    Stated is a grade that follows the attribute's name in the same sentence, after nothing but `:`, `=`, `is`, `of`,
    `grade` and quotes (`Size of lesion: 2`, `"Depth of lesion" is grade 1`). An attribute that is not stated, is stated
    with two different grades, or has no answered grade counts 0. It says nothing about the truth: a consistent wrong
    answer scores 1, so its weight stays below that of `moaks_accuracy`.
    """
    agree = 0
    for attribute in question.attributes:
        stated = set(_statement(attribute.name).findall(answer.reasoning))
        agree += attribute.name in answer.grades and stated == {str(answer.grades[attribute.name])}
    return agree / len(question.attributes)


@lru_cache(maxsize=256)
def _statement(name: str) -> re.Pattern[str]:
    # every repeat is bounded: linear in the text
    quotes = "[\"'`*]{0,2}"
    return re.compile(
        rf"(?<!\w){re.escape(name)}{quotes} {{0,3}}(?:[:=]|is|of)? {{0,3}}(?:grade {{0,3}})?{quotes}"
        r"(\d+)(?!\w|\.\d| ?[-/] ?\d)",  # not 2.5, 2mm, 0-3
        re.IGNORECASE,
    )
