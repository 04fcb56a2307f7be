"""Which tokens answer for which reward."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards import QUESTIONS, Box3D, format_answer
from rl.credit import AFTER, BEFORE, BOX, token_parts

TEXT = format_answer(QUESTIONS[31], {"grade": 2}, Box3D(2, 6, 10, 30, 20, 50), "A spur")


def marked(tokens: list[str]) -> dict[int, str]:
    """Part -> its text."""
    parts: dict[int, str] = {BEFORE: "", BOX: "", AFTER: ""}
    for token, part in zip(tokens, token_parts(tokens), strict=True):
        parts[part] += token
    return parts


def test_the_box_is_its_key_and_its_numbers() -> None:
    parts = marked(list(TEXT))
    assert parts[BOX] == '"bbox": [2, 5, 10, 29, 20, 49]'
    assert parts[BEFORE] == "<think>A spur</think><answer>{"
    assert parts[AFTER].startswith(', "MOAKS_scores"')


def test_a_token_that_touches_the_box_belongs_to_it() -> None:
    parts = marked(["<answer>{", '{"bbox', '": [2, 5, 10, 29, 20, 4', '9], "MOAKS', '_scores": 1}'])
    assert parts[BOX] == '{"bbox": [2, 5, 10, 29, 20, 49], "MOAKS'
    assert parts[AFTER] == '_scores": 1}'


@pytest.mark.parametrize("text", ["", "no box", '<answer>{"bbox": [1, 2', '"bbox": [1, 2]<answer>{}'])
def test_without_a_box_in_the_answer_every_token_answers_for_everything(text: str) -> None:
    assert set(token_parts(list(text))) <= {BEFORE}


def test_a_box_that_was_only_talked_about_is_not_the_answered_one() -> None:
    talk = 'I think "bbox": [0, 1, 0, 1, 0, 1] fits. '
    assert marked(list(talk + TEXT))[BOX] == '"bbox": [2, 5, 10, 29, 20, 49]'


@given(st.lists(st.integers(0, len(TEXT)), max_size=9))
def test_wherever_tokens_are_cut_the_parts_follow_each_other(cuts: list[int]) -> None:
    bounds = sorted({0, len(TEXT), *cuts})
    tokens = [TEXT[a:b] for a, b in pairwise(bounds)]
    parts = token_parts([*tokens, ""])  # the end of the turn has no text
    assert parts == sorted(parts)
    assert parts[-1] == AFTER
