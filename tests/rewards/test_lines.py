"""Completions as JSON lines: what is read, what is refused, and what is never lost."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards import QUESTIONS, Answer, Box3D, Component, RewardSuite, format_answer, group_reward
from rewards.lines import score_lines, scored_record

BOX = Box3D(2, 6, 10, 30, 20, 50)
SUITE = RewardSuite([Component("output_format", 0.2), Component("moaks_accuracy"), Component("box_iou")])
GRADES = {"Size of lesion": 2, "Depth of lesion": 1}
GOLD = format_answer(QUESTIONS[16], GRADES, BOX, "thin")


def line(**changes: Any) -> str:
    record = {"question_id": 16, "completion": GOLD, "truth": {"grades": GRADES, "bbox": BOX.to_text()}}
    return json.dumps({**record, **changes})


def test_a_line_keeps_its_fields_and_gains_what_it_earned() -> None:
    (scored,) = score_lines(SUITE, [line(mine="x")])
    record = scored_record(scored)
    assert record["mine"] == "x"
    assert record["reward"] == 1.0
    assert record["components"] == {"output_format": 1.0, "moaks_accuracy": 1.0, "box_iou": 1.0}
    assert record["problems"] == {"format": "none", "grades": "none", "bbox": "none"}


def test_a_grid_is_minded_when_the_line_has_one() -> None:
    inside, outside = score_lines(SUITE, [line(), line(shape=[4, 96, 96])])
    assert scored_record(inside)["problems"]["bbox"] == "none"
    assert scored_record(outside)["problems"]["bbox"] == "box_outside_volume"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("nonsense", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("3", "not an object but int"),
        ('{"question_id": 16, "completion": "x"}', "needs the field 'truth'"),
        ('{"completion": "\udcff"}', "not UTF-8"),
        (line(question_id=70), "question_id must be a number from 1 to 69, got 70"),
        (line(question_id="16"), "question_id must be a number from 1 to 69, got '16'"),
        (line(question_id=True), "question_id must be a number from 1 to 69, got True"),
        (line(question_id=[16]), "question_id must be a number from 1 to 69, got [16]"),
        (line(example_id=None), "example_id must be text or an integer, got None"),
        (line(visit=12), 'visit must be text such as "00M", got 12'),
        (line(side=2), 'side must be "right" or "left", got 2'),
        (
            line(shape=[4, 96]),
            "shape must be three positive numbers (slices, x, y) or be left out, got [4, 96]",
        ),
        (line(shape=["4", "96", "96"]), "shape must be three positive"),
        (line(shape=5), "shape must be three positive"),
        (line(spacing_mm=[1, 0, 1]), "spacing_mm must be three positive"),
        (line(spacing_mm=[1, math.nan, 1]), "spacing_mm must be three positive"),
        (line(completion=None), "completion must be text, got None"),
        (line(truth=[]), 'truth must be {"grades": {attribute: grade}, "bbox": ...}, got []'),
        (line(truth={}), 'truth must be {"grades"'),
        (line(truth={"grades": {"Size": 1}}), "no attribute 'Size'; it has"),
        (line(truth={"grades": {"Size of lesion": 4}}), "grade of 'Size of lesion' must be in"),
        (line(truth={"grades": {}, "bbox": [1, 2]}), "six integers or null"),
        (
            line(truth={"grades": {}, "bbox": [5, 2, 0, 1, 0, 1]}),
            "got [5, 2, 0, 1, 0, 1]: Box3D needs slice_min",
        ),
        (line(truth={"grades": {}, "bbox": [True, 2, 0, 1, 0, 1]}), "integers, got True"),
    ],
)
def test_a_bad_line_is_named_by_its_number_and_the_others_are_scored(text: str, problem: str) -> None:
    scored = list(score_lines(SUITE, [line(), "", text, line()]))
    assert [x.number for x in scored] == [1, 3, 4]
    assert problem in scored[1].problem
    assert scored[0].row is not None
    assert scored[2].row is not None


def test_a_grade_of_null_was_not_graded() -> None:
    (scored,) = score_lines(
        SUITE, [line(truth={"grades": {**GRADES, "Depth of lesion": None}, "bbox": None})]
    )
    assert scored.example is not None
    assert scored.example.truth.grades == {"Size of lesion": 2}


def test_one_example_id_for_two_truths_is_refused_and_both_lines_named() -> None:
    other = line(example_id="a", truth={"grades": {"Size of lesion": 0}, "bbox": None})
    scored = list(score_lines(SUITE, [line(example_id="a"), other, line(example_id="b")]))
    assert [x.row is None for x in scored] == [True, True, False]
    assert "'a' stands for one question and truth in line 1 and for another in line 2" in scored[0].problem


@given(
    st.text()
    | st.binary().map(lambda b: b.decode("latin1"))
    | st.sampled_from(["{}", '{"truth": {}}', "null"])
)
def test_any_text_is_a_line_or_a_problem(text: str) -> None:
    for scored in score_lines(SUITE, [text]):
        assert (scored.row is None) == bool(scored.problem)


@pytest.mark.usefixtures("own_registry")
def test_lines_in_a_row_with_one_example_id_are_a_group() -> None:
    @group_reward
    def share_of_group(answers: Sequence[Answer]) -> list[float]:
        return [1 / len(answers)] * len(answers)

    suite = RewardSuite([Component("share_of_group")])
    ids = ["a", "a", "b", "a", None, None]
    texts = [line(**({} if i is None else {"example_id": i})) for i in ids]
    totals = [x.row.total for x in score_lines(suite, texts) if x.row]
    assert totals == [0.5, 0.5, 1.0, 1.0, 1.0, 1.0]
