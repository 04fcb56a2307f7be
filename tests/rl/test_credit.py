"""Which tokens answer for which reward."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards import QUESTIONS, Box3D, Truth, format_answer
from rewards.redteam import cases
from rl.credit import BOX, FIRST_ATTRIBUTE, REST, graded_alone, token_parts

SIZE, DEPTH = "Size of lesion", "Depth of lesion"
TEXT = format_answer(QUESTIONS[16], {SIZE: 2, DEPTH: 1}, Box3D(2, 6, 10, 30, 20, 50), f'A "{SIZE}": 3')


def marked(tokens: list[str], names: tuple[str, ...] = (SIZE, DEPTH)) -> dict[int, str]:
    """Part -> its text."""
    parts = dict.fromkeys(range(FIRST_ATTRIBUTE + len(names)), "")
    for token, part in zip(tokens, token_parts(tokens, names), strict=True):
        parts[part] += token
    return parts


def test_the_box_and_every_grade_are_their_key_and_their_value() -> None:
    parts = marked(list(TEXT))
    assert parts[BOX] == '"bbox": [2, 5, 10, 29, 20, 49]'
    assert parts[FIRST_ATTRIBUTE] == f'"{SIZE}": 2'
    assert parts[FIRST_ATTRIBUTE + 1] == f'"{DEPTH}": 1'
    assert parts[REST].startswith(f'<think>A "{SIZE}": 3</think><answer>{{, "MOAKS_scores": {{')


def test_a_token_that_touches_a_part_belongs_to_it() -> None:
    tokens = ["<answer>{", '{"bbox', '": [2, 5, 10, 29, 20, 4', '9], "grade', '": ', "2", "}}"]
    parts = marked(tokens, ("grade",))
    assert parts[BOX] == '{"bbox": [2, 5, 10, 29, 20, 49], "grade'
    assert parts[FIRST_ATTRIBUTE] == '": 2'
    assert parts[REST] == "<answer>{}}"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nothing",
        '<answer>{"bbox": [1, 2',
        '"bbox": [1, 2], "Size of lesion": 1 <answer>{}',
        '"Size of lesion": [',
    ],
)
def test_what_is_not_answered_leaves_every_token_answering_for_everything(text: str) -> None:
    assert set(token_parts(list(text), (SIZE, DEPTH))) <= {REST}


def test_a_box_that_was_only_talked_about_is_not_the_answered_one() -> None:
    talk = 'I think "bbox": [0, 1, 0, 1, 0, 1] fits. '
    assert marked(list(talk + TEXT))[BOX] == '"bbox": [2, 5, 10, 29, 20, 49]'


@given(st.lists(st.integers(0, len(TEXT)), max_size=9))
def test_wherever_tokens_are_cut_the_parts_follow_each_other(cuts: list[int]) -> None:
    bounds = sorted({0, len(TEXT), *cuts})
    tokens = [TEXT[a:b] for a, b in pairwise(bounds)]
    parts = [part for part in token_parts([*tokens, ""], (SIZE, DEPTH)) if part != REST]
    assert parts == sorted(parts)


def test_an_attribute_without_a_true_grade_is_not_singled_out() -> None:
    example = next(c.example for c in cases("balanced", knees=1) if c.example.question.question_id == 16)
    assert list(graded_alone(example, 1).truth.grades) == [DEPTH]
    assert graded_alone(example, 1).truth.bbox == example.truth.bbox
    assert graded_alone(example, 2) is example
    ungraded = replace(example, truth=Truth({SIZE: 1}, None))
    assert graded_alone(ungraded, 1) is ungraded
    assert graded_alone(ungraded, 0) is ungraded  # the only grade there is
