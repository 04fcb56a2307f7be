"""Which tokens answer for which reward."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards import QUESTIONS, Box3D, Truth, format_answer
from rewards.redteam import cases
from rl.credit import (
    FIRST_ATTRIBUTE,
    FIRST_COORDINATE,
    REST,
    graded_alone,
    placed_alone,
    token_parts,
)

SIZE, DEPTH = "Size of lesion", "Depth of lesion"
boxes = st.lists(st.integers(0, 99), min_size=6, max_size=6).map(
    lambda n: [*sorted(n[:2]), *sorted(n[2:4]), *sorted(n[4:])]
)
TEXT = format_answer(QUESTIONS[16], {SIZE: 2, DEPTH: 1}, Box3D(2, 6, 10, 30, 20, 50), f'A "{SIZE}": 3')


def marked(tokens: list[str], names: tuple[str, ...] = (SIZE, DEPTH)) -> dict[int, str]:
    """Part -> its text."""
    parts = dict.fromkeys(range(FIRST_ATTRIBUTE + len(names)), "")
    for token, part in zip(tokens, token_parts(tokens, names), strict=True):
        parts[part] += token
    return parts


def numbers(parts: dict[int, str]) -> list[str]:
    return [parts[part] for part in range(FIRST_COORDINATE, FIRST_ATTRIBUTE)]


def test_every_number_of_the_box_is_a_part_and_every_grade_with_its_key() -> None:
    parts = marked(list(TEXT))
    assert numbers(parts) == ["2,", "5,", "10,", "29,", "20,", "49]"]
    assert parts[FIRST_ATTRIBUTE] == f'"{SIZE}": 2'
    assert parts[FIRST_ATTRIBUTE + 1] == f'"{DEPTH}": 1'
    assert parts[REST].startswith(f'<think>A "{SIZE}": 3</think><answer>{{"bbox": [     , "MOAKS_scores": {{')


def test_a_token_that_touches_a_part_belongs_to_it() -> None:
    tokens = ["<answer>{", '{"bbox', '": [2, 5, 10, 29, 20, 4', '9], "grade', '": ', "2", "}}"]
    parts = marked(tokens, ("grade",))
    # the first of two parts has the token
    assert numbers(parts) == ['": [2, 5, 10, 29, 20, 4', "", "", "", "", '9], "grade']
    assert parts[FIRST_ATTRIBUTE] == '": 2'
    assert parts[REST] == '<answer>{{"bbox}}'


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nothing",
        '<answer>{"bbox": [1, 2',
        '<answer>{"bbox": [1, 2, 3, 4, 5]}',
        '<answer>{"bbox": [1, 2, 3, 4, 5, 6, 7]}',
        '"bbox": [1, 2], "Size of lesion": 1 <answer>{}',
        '"Size of lesion": [',
    ],
)
def test_what_is_not_answered_leaves_every_token_answering_for_everything(text: str) -> None:
    assert set(token_parts(list(text), (SIZE, DEPTH))) <= {REST}


def test_a_box_that_was_only_talked_about_is_not_the_answered_one() -> None:
    talk = 'I think "bbox": [0, 1, 0, 1, 0, 1] fits. '
    assert numbers(marked(list(talk + TEXT))) == ["2,", "5,", "10,", "29,", "20,", "49]"]


@given(st.lists(st.integers(0, len(TEXT)), max_size=9))
def test_wherever_tokens_are_cut_the_parts_follow_each_other(cuts: list[int]) -> None:
    bounds = sorted({0, len(TEXT), *cuts})
    tokens = [TEXT[a:b] for a, b in pairwise(bounds)]
    parts = [part for part in token_parts([*tokens, ""], (SIZE, DEPTH)) if part != REST]
    assert parts == sorted(parts)


@given(boxes, boxes, st.integers(0, 5))
def test_a_number_placed_alone_stands_in_a_box_that_is_right_but_for_it(
    said: list[int], true: list[int], coordinate: int
) -> None:
    text = (
        f'<think>"bbox": [1, 1, 1, 1, 1, 1]</think><answer>{{"bbox" : {said}, "MOAKS_scores": {{}}}}</answer>'
    )
    expected = [said[i] if i == coordinate else n for i, n in enumerate(true)]
    found = placed_alone(text, Box3D.from_text(true), coordinate)
    assert found == text.replace(f'"bbox" : {said}', f'"bbox": {expected}')


def test_without_a_box_of_six_numbers_nothing_can_be_placed() -> None:
    for text in ("", "<answer>{}", '<answer>{"bbox": [1, 2, 3]}', '<answer>{"bbox": [1, 2, 3, 4, 5, 6.5]}'):
        assert placed_alone(text, Box3D(0, 1, 0, 1, 0, 1), 0) == text


def test_an_attribute_without_a_true_grade_is_not_singled_out() -> None:
    example = next(c.example for c in cases("balanced", knees=1) if c.example.question.question_id == 16)
    assert list(graded_alone(example, 1).truth.grades) == [DEPTH]
    assert graded_alone(example, 1).truth.bbox == example.truth.bbox
    assert graded_alone(example, 2) is example
    ungraded = replace(example, truth=Truth({SIZE: 1}, None))
    assert graded_alone(ungraded, 1) is ungraded
    assert graded_alone(ungraded, 0) is ungraded  # the only grade there is
