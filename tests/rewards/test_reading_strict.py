"""The strict reader takes the declared format and nothing else; grades and box fail apart."""

import json
from typing import Any

import pytest

from rewards import QUESTIONS, Answer, Box3D, Problem, read_answer

CARTILAGE = QUESTIONS[16]
GRADES = {"Size of lesion": 2, "Depth of lesion": 1}
BOX = [2, 5, 10, 29, 20, 49]


def body(bbox: object = BOX, scores: object = None) -> str:
    return json.dumps({"bbox": bbox, "MOAKS_scores": scores or {CARTILAGE.entity: GRADES}})


def completion(answer: str, thought: str = "The cartilage is thin.") -> str:
    return f"<think>{thought}</think><answer>{answer}</answer>"


def read(text: str, **options: object) -> Answer:
    return read_answer(text, CARTILAGE, **options)  # type: ignore[arg-type]


GOOD = completion(body())


def test_the_declared_format_is_read_in_full() -> None:
    answer = read(GOOD)
    assert answer.ok
    assert answer.strict
    assert answer.grades == GRADES
    assert answer.bbox == Box3D(2, 6, 10, 30, 20, 50)
    assert answer.reasoning == "The cartilage is thin."


@pytest.mark.parametrize(
    "text",
    [
        f"\n {GOOD}\n",
        GOOD.replace("</think>", "</think>\n\n"),
        completion("\n" + json.dumps(json.loads(body()), indent=2) + "\n"),
        completion(body(), "several\nlines\nof thought"),
        completion(json.dumps(dict(reversed(json.loads(body()).items())))),
    ],
    ids=["around", "between", "indented over lines", "thought over lines", "keys in the other order"],
)
def test_white_space_and_key_order_are_free(text: str) -> None:
    """A multi-line answer that formats well must also be read: the two never disagree."""
    answer = read(text)
    assert answer.ok
    assert answer.strict


def test_without_reasoning_the_think_part_must_be_absent() -> None:
    bare = f"<answer>{body()}</answer>"
    assert read(bare, reasoning="none").ok
    assert read(GOOD, reasoning="none").format_problem is Problem.UNEXPECTED_THINK
    assert read(bare, reasoning="required").format_problem is Problem.MISSING_THINK


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", Problem.MISSING_THINK),
        ("<", Problem.MISSING_THINK),
        ("<think></think><answer></answer>", Problem.EMPTY_THINK),
        (completion(body(), ""), Problem.EMPTY_THINK),
        (completion(body(), " \n\t"), Problem.EMPTY_THINK),
        (completion(body(), "..."), Problem.EMPTY_THINK),
        (completion(""), Problem.NOT_JSON),
        (f"<think>a</think>{body()}", Problem.MISSING_ANSWER),
        (f"<think>a</think><answer>{body()}", Problem.MISSING_ANSWER),
        (f"<think>a <answer>{body()}</answer>", Problem.ANSWER_IN_THINK),
        (f"<think>a <answer>{body()}</answer></think>", Problem.ANSWER_IN_THINK),
        (f"<think>a <answer>{body()}</answer></think><answer>{body()}</answer>", Problem.ANSWER_IN_THINK),
        (GOOD + f"<answer>{body()}</answer>", Problem.SEVERAL_ANSWERS),
        (completion(f"<answer>{body()}</answer>"), Problem.SEVERAL_ANSWERS),
        (GOOD + GOOD, Problem.SEVERAL_ANSWERS),
        (GOOD + " That is all.", Problem.TEXT_OUTSIDE),
        ("Sure! " + GOOD, Problem.TEXT_OUTSIDE),
        (GOOD.replace("</think>", "</think> so "), Problem.TEXT_OUTSIDE),
        (completion(body(), "a<think>b"), Problem.UNEXPECTED_THINK),
        ("<think>a</think>" + GOOD, Problem.UNEXPECTED_THINK),
        (GOOD.replace("<answer>", "<Answer>"), Problem.MISSING_ANSWER),
        (completion(f"```json\n{body()}\n```"), Problem.NOT_JSON),
        (completion(body() + "."), Problem.NOT_JSON),
        (completion(body().replace("2,", "2,,")), Problem.NOT_JSON),
        (completion(body() * 2), Problem.NOT_JSON),
        (completion("[1, 2]"), Problem.NOT_AN_OBJECT),
        (completion("2"), Problem.NOT_AN_OBJECT),
        (completion('{"bbox": [start_slice, end_slice, x_min, x_max, y_min, y_max]}'), Problem.NOT_JSON),
        (completion('{"note": 1, ' + body()[1:]), Problem.UNKNOWN_KEY),
        (completion('{"a":' * 50 + "1" + "}" * 50), Problem.TOO_DEEP),
        (completion(body() + " " * 20_000), Problem.TOO_LONG),
        (GOOD + " " * 300_000, Problem.TOO_LONG),
    ],
)
def test_everything_else_is_refused_by_name_and_nothing_is_read(text: str, problem: Problem) -> None:
    answer = read(text)
    assert answer.format_problem is problem
    assert not answer.strict
    assert answer.grades == {}
    assert answer.bbox is None


@pytest.mark.parametrize("unknown", [{"mode": "lenient"}, {"mode": "Strict"}, {"reasoning": "optional"}])
def test_an_unknown_mode_is_refused_and_never_taken_for_another(unknown: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(unknown.values()))):
        read_answer(GOOD, CARTILAGE, **unknown)


@pytest.mark.parametrize(
    ("scores", "problem", "kept"),
    [
        ('{"Size of lesion": true, "Depth of lesion": 1}', Problem.NOT_AN_INTEGER, {"Depth of lesion": 1}),
        ('{"Size of lesion": NaN, "Depth of lesion": 1}', Problem.NOT_AN_INTEGER, {"Depth of lesion": 1}),
        ('{"Size of lesion": 1e400, "Depth of lesion": 1}', Problem.NOT_AN_INTEGER, {"Depth of lesion": 1}),
        ('{"Size of lesion": 2.0, "Depth of lesion": 1}', Problem.NOT_AN_INTEGER, {"Depth of lesion": 1}),
        ('{"Size of lesion": "2", "Depth of lesion": 1}', Problem.NOT_AN_INTEGER, {"Depth of lesion": 1}),
        ('{"Size of lesion": "0-3", "Depth of lesion": "0-3"}', Problem.NOT_AN_INTEGER, {}),
        (
            '{"Size of lesion": [0, 1, 2, 3], "Depth of lesion": 1}',
            Problem.NOT_AN_INTEGER,
            {"Depth of lesion": 1},
        ),
        (
            '{"Size of lesion": {"grade": 2}, "Depth of lesion": 1}',
            Problem.NOT_AN_INTEGER,
            {"Depth of lesion": 1},
        ),
        (
            '{"Size of lesion": 9' + "9" * 5000 + ', "Depth of lesion": 1}',
            Problem.NOT_AN_INTEGER,
            {"Depth of lesion": 1},
        ),
        ('{"Size of lesion": 4, "Depth of lesion": 1}', Problem.OUTSIDE_GRADE_SPACE, {"Depth of lesion": 1}),
        ('{"Size of lesion": -1, "Depth of lesion": 1}', Problem.OUTSIDE_GRADE_SPACE, {"Depth of lesion": 1}),
        ('{"Size of lesion": null, "Depth of lesion": 1}', Problem.MISSING_ATTRIBUTE, {"Depth of lesion": 1}),
        ('{"Depth of lesion": 1}', Problem.MISSING_ATTRIBUTE, {"Depth of lesion": 1}),
        ('{"Size of lesion": 2, "Size of lesion": 2, "Depth of lesion": 1}', Problem.DUPLICATE_KEY, {}),
        ('{"Size of lesion": 2, "Depth of lesion": 1, "size": 0}', Problem.UNKNOWN_KEY, {}),
        ("{}", Problem.MISSING_GRADES, {}),
        ("[2, 1]", Problem.NOT_AN_OBJECT, {}),
        ("2", Problem.NOT_AN_OBJECT, {}),
    ],
)
def test_bad_grades_are_named_and_do_not_spoil_the_box(
    scores: str, problem: Problem, kept: dict[str, int]
) -> None:
    text = f'{{"bbox": {BOX}, "MOAKS_scores": {{"{CARTILAGE.entity}": {scores}}}}}'
    answer = read(completion(text))
    assert answer.grades_problem is problem
    assert answer.grades == kept
    assert answer.bbox == Box3D.from_text(BOX)
    assert answer.bbox_problem is answer.format_problem is Problem.NONE
    assert not answer.ok


@pytest.mark.parametrize(
    ("bbox", "problem"),
    [
        ("[5, 2, 10, 29, 20, 49]", Problem.BOX_INVERTED),
        ("[15, 0, 95, 0, 95, 0]", Problem.BOX_INVERTED),
        ("[2, 5, 10, 29, 20]", Problem.BOX_NOT_SIX_INTEGERS),
        ("[2, 5, 10, 29, 20, 49, 1]", Problem.BOX_NOT_SIX_INTEGERS),
        ("[2, 5, 10, 29, 20, 49.5]", Problem.BOX_NOT_SIX_INTEGERS),
        ("[2, 5, 10, 29, 20, Infinity]", Problem.BOX_NOT_SIX_INTEGERS),
        ("[2, 5, 10, 29, 20, 1e400]", Problem.BOX_NOT_SIX_INTEGERS),
        ("[2, 5, 10, 29, 20, 99999999999]", Problem.BOX_NOT_SIX_INTEGERS),
        ("[false, true, 10, 29, 20, 49]", Problem.BOX_NOT_SIX_INTEGERS),
        ('["2", 5, 10, 29, 20, 49]', Problem.BOX_NOT_SIX_INTEGERS),
        ("[[2, 5], [10, 29], [20, 49]]", Problem.BOX_NOT_SIX_INTEGERS),
        ('"2, 5, 10, 29, 20, 49"', Problem.BOX_NOT_SIX_INTEGERS),
        ("{}", Problem.BOX_NOT_SIX_INTEGERS),
        ("null", Problem.BOX_NOT_SIX_INTEGERS),
    ],
)
def test_a_bad_box_is_named_and_does_not_spoil_good_grades(bbox: str, problem: Problem) -> None:
    text = f'{{"bbox": {bbox}, "MOAKS_scores": {json.dumps({CARTILAGE.entity: GRADES})}}}'
    answer = read(completion(text))
    assert answer.bbox_problem is problem
    assert answer.bbox is None
    assert answer.grades == GRADES
    assert answer.grades_problem is answer.format_problem is Problem.NONE


def test_a_box_that_leaves_the_volume_is_flagged_and_kept() -> None:
    text = completion(body([2, 16, 10, 29, 20, 49]))
    assert read(text).ok
    answer = read(text, shape=(16, 96, 96))
    assert answer.bbox_problem is Problem.BOX_OUTSIDE_VOLUME
    assert answer.bbox == Box3D(2, 17, 10, 30, 20, 50)
    assert answer.strict
    assert read(completion(body([2, 15, 10, 29, 20, 49])), shape=(16, 96, 96)).ok


def test_a_negative_voxel_is_outside_any_volume() -> None:
    assert read(completion(body([-1, 5, 10, 29, 20, 49]))).bbox_problem is Problem.BOX_OUTSIDE_VOLUME


def test_two_boxes_or_two_score_objects_are_duplicates_and_spoil_only_themselves() -> None:
    twice = completion(body()[:-1] + ', "bbox": [0, 1, 0, 1, 0, 1]}')
    assert read(twice).bbox_problem is Problem.DUPLICATE_KEY
    assert read(twice).grades == GRADES
    scores = completion(body()[:-1] + f', "MOAKS_scores": {json.dumps({CARTILAGE.entity: GRADES})}}}')
    assert read(scores).grades_problem is Problem.DUPLICATE_KEY
    assert read(scores).bbox is not None


def test_an_escaped_key_is_the_same_key() -> None:
    twice = completion(body()[:-1] + ', "\\u0062box": [0, 1, 0, 1, 0, 1]}')
    assert read(twice).bbox_problem is Problem.DUPLICATE_KEY


def test_another_entity_earns_nothing() -> None:
    answer = read(completion(body(scores={QUESTIONS[17].entity: GRADES})))
    assert answer.grades_problem is Problem.UNKNOWN_KEY
    assert answer.grades == {}
    both = read(completion(body(scores={CARTILAGE.entity: GRADES, QUESTIONS[17].entity: GRADES})))
    assert both.grades_problem is Problem.UNKNOWN_KEY


def test_values_of_the_wrong_size_still_keep_the_format() -> None:
    """The format is envelope, keys and types; a grade of 9 or an inverted box is wrong in value."""
    wrong = body([5, 2, 10, 29, 20, 49], {CARTILAGE.entity: {"Size of lesion": 9, "Depth of lesion": 1}})
    answer = read(completion(wrong))
    assert not answer.ok
    assert answer.strict
    assert not read(completion(body([2, 5]))).strict
