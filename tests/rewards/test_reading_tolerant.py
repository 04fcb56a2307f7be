"""The tolerant reader takes every shape of the dataset and of models, and never gives a lucky score."""

import json
from typing import Any

import pytest

from rewards import QUESTIONS, Answer, Box3D, Problem, Question, read_answer

CARTILAGE = QUESTIONS[19]
GRADES = {"Size of lesion": 2, "Depth of lesion": 1}
BOX = [2, 5, 10, 29, 20, 49]
OBJECT = json.dumps({"bbox": BOX, "MOAKS_scores": {CARTILAGE.entity: GRADES}})
OTHER = json.dumps({"bbox": BOX, "MOAKS_scores": {CARTILAGE.entity: {**GRADES, "Size of lesion": 3}}})


def read(text: str, question: Question = CARTILAGE) -> Answer:
    return read_answer(text, question, mode="tolerant")


def public_form(question: Question) -> dict[str, Any]:
    """The answer in the shape the public template of that question has: highest grade everywhere."""
    answer: dict[str, Any] = {}
    for attribute in question.attributes:
        node = answer
        for key in attribute.path[:-1]:
            node = node.setdefault(key, {})
        node[attribute.path[-1]] = attribute.grades[-1]
    return answer


@pytest.mark.parametrize("question", QUESTIONS.values(), ids=lambda q: str(q.question_id))
def test_every_public_shape_is_read(question: Question) -> None:
    """With and without wrapper, bare scalars, with a full stop, in a fence, with quotes of Python."""
    grades = {attribute.name: attribute.grades[-1] for attribute in question.attributes}
    plain = json.dumps(public_form(question))
    for text in (
        plain,
        plain + ".",
        f"```json\n{plain}\n```",
        str(public_form(question)),
        f"It is: {plain} I think.",
    ):
        assert read(text, question).grades == grades


@pytest.mark.parametrize("question", QUESTIONS.values(), ids=lambda q: str(q.question_id))
def test_snake_case_keys_are_read(question: Question) -> None:
    entity = "_".join(question.entity.replace("-", " ").split())
    for joined in (True, False):
        keys = {a.name: "_".join(a.name.replace("%", "percent").lower().split()) for a in question.attributes}
        inner = {keys[a.name]: a.grades[0] for a in question.attributes}
        answer = {f"{entity}.{key}": grade for key, grade in inner.items()} if joined else {entity: inner}
        assert read(json.dumps(answer), question).grades == {a.name: a.grades[0] for a in question.attributes}


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("femur_medial_central_cartilage_lesion.size", "Size of lesion"),
        ("femur_medial_central_cartilage_lesion.depth", "Depth of lesion"),
        ("femur_medial_central_cartilage_lesion_depth", "Depth of lesion"),
        ("Femur Medial Central Cartilage Lesion.Depth of lesion", "Depth of lesion"),
        ("depth_of_lesion", "Depth of lesion"),
    ],
)
def test_near_spellings_of_a_key_mean_the_attribute(key: str, name: str) -> None:
    assert read(json.dumps({key: 3})).grades == {name: 3}


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("size", "Size of BML (including cyst)"),
        ("bml_size", "Size of BML (including cyst)"),
        ("number_of_bmls", "Number of BML within subregion"),
        ("percent_bml", "% of lesion that is BML (excluding cyst)"),
        ("percentage_of_lesion", "% of lesion that is BML (excluding cyst)"),
        ("% of lesion that is BML", "% of lesion that is BML (excluding cyst)"),
    ],
)
def test_near_spellings_of_bml_keys_mean_the_attribute(key: str, name: str) -> None:
    assert read(json.dumps({"patella_medial_BML": {key: 2}}), QUESTIONS[1]).grades == {name: 2}


@pytest.mark.parametrize(
    "key", ["cyst", "of", "", "grade", "lesion", "bml", "including excluding size depth"]
)
def test_a_key_that_could_mean_several_attributes_means_none(key: str) -> None:
    answer = read(json.dumps({"patella_medial_BML": {key: 2}}), QUESTIONS[1])
    assert answer.grades == {}
    assert answer.grades_problem is Problem.UNKNOWN_KEY


@pytest.mark.parametrize(
    "text",
    [
        OBJECT,
        f"<think>thin</think><answer>{OBJECT}</answer>",
        f"thin</think><answer>{OBJECT}</answer>",
        f"<think>thin</think>{OBJECT}",
        f"<THINK>thin</THINK>\n<Answer>{OBJECT}</Answer> Done.",
        f"<answer>{OBJECT}",
        f"<answer>```json\n{OBJECT}\n```</answer>",
        f"It is thin.\nFinal diagnosis: {OBJECT}",
        f"It is thin.\n**Final Diagnosis:** {OBJECT}",
        f"{OBJECT}\n\n{OBJECT}",
        f"<answer>{OBJECT}</answer><answer>{OBJECT}</answer>",
        f"[{OBJECT}]",
        f'A "quoted word, a brace-free 5" screen: {OBJECT}',
        OBJECT[:-1],
        OBJECT[:-3] + ".",
        OBJECT.replace(": 2", ': "2"').replace("[2, 5", '["2", 5.0').replace(": 1", ": 1.0"),
        OBJECT.replace('{"bbox"', '{"confidence": 0.9, "explanation": "thin, {not} much", "bbox"'),
        "The format is " + OBJECT.replace(": 2", ": (grade from 0-3)") + f" so {OBJECT}",
    ],
)
def test_model_habits_are_read(text: str) -> None:
    answer = read(text)
    assert answer.ok
    assert answer.grades == GRADES
    assert answer.bbox == Box3D.from_text(BOX)


def test_a_box_and_grades_in_two_objects_belong_together() -> None:
    answer = read(f'{{"bbox": {BOX}}} and {json.dumps(GRADES)}')
    assert answer.ok


def test_the_unbalanced_public_templates_are_read_when_copied() -> None:
    question = QUESTIONS[58]
    for text in (
        '"medial_meniscal_root_tear": {"presence": 1}}',
        f'{BOX}, "medial_meniscal_root_tear": {{"presence": 1}}}}',
        f'{{"bbox": {BOX}, "medial_meniscal_root_tear": {{"presence": 1}}',
        '{"presence": 1}',
    ):
        answer = read(text, question)
        assert answer.grades == {"presence": 1}
        assert answer.bbox == (Box3D.from_text(BOX) if "[" in text else None)


def test_a_bare_grade_answers_a_question_of_one_attribute_only() -> None:
    assert read("<answer>2</answer>", QUESTIONS[44]).grades == {"grade": 2}
    assert read("Final diagnosis: 2.", QUESTIONS[44]).grades == {"grade": 2}
    assert read("<answer>2</answer>", CARTILAGE).grades == {}
    assert read("0 1 2 3", QUESTIONS[44]).grades == {}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (f"<think>{OBJECT}</think>", Problem.ANSWER_IN_THINK),
        (f"<think><answer>{OBJECT}</answer>", Problem.ANSWER_IN_THINK),
        (f"<think><answer>{OBJECT}</answer></think>", Problem.ANSWER_IN_THINK),
        ("", Problem.MISSING_ANSWER),
        ("<think></think><answer></answer>", Problem.MISSING_ANSWER),
        ("grade 2, or 3", Problem.MISSING_ANSWER),
        ("<answer>grade 2</answer>", Problem.NOT_JSON),
        (OBJECT.replace(', "MOAKS', ', <think>hm</think>"MOAKS'), Problem.NOT_JSON),
        (f"<answer>{OBJECT[:9]}</answer><answer>{OBJECT[9:]}</answer>", Problem.NOT_JSON),
        ('{"bbox": [start_slice, end_slice, x_min, x_max, y_min, y_max]}', Problem.NOT_JSON),
        ('{"a":' * 50 + "1" + "}" * 50, Problem.TOO_DEEP),
        ("{} " * 100, Problem.SEVERAL_ANSWERS),
        (OBJECT + " " * 20_000, Problem.TOO_LONG),
        (OBJECT + " " * 300_000, Problem.TOO_LONG),
    ],
)
def test_what_holds_no_answer_is_named_and_nothing_is_read(text: str, problem: Problem) -> None:
    answer = read(text)
    assert answer.format_problem is problem
    assert answer.grades == {}
    assert answer.bbox is None


@pytest.mark.parametrize(
    "text",
    [
        f"{OBJECT} {OTHER}",
        f"<answer>{OBJECT}</answer><answer>{OTHER}</answer>",
        f"<think>a</think><answer>{OBJECT}</answer><think>b</think><answer>{OTHER}</answer>",
        f"Final diagnosis: {OBJECT} Final diagnosis: {OTHER}",
        " ".join(OBJECT.replace(": 2", f": {grade}") for grade in range(4)),
    ],
)
def test_two_different_answers_earn_no_grades_but_an_undisputed_box_stays(text: str) -> None:
    answer = read(text)
    assert answer.format_problem is answer.grades_problem is Problem.SEVERAL_ANSWERS
    assert answer.grades == {}
    assert answer.bbox == Box3D.from_text(BOX)


def test_two_different_boxes_leave_undisputed_grades() -> None:
    answer = read(OBJECT + OBJECT.replace("[2,", "[1,"))
    assert answer.bbox is None
    assert answer.bbox_problem is Problem.SEVERAL_ANSWERS
    assert answer.grades == GRADES


def test_what_is_thought_is_not_answered() -> None:
    assert read(f"<think>maybe {OTHER}</think>{OBJECT}").grades == GRADES
    assert read(f"maybe {OTHER}</think>{OBJECT}").grades == GRADES
    assert read(f"<think>maybe {OTHER}</think><think>or</think>{OBJECT}").grades == GRADES


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("true", Problem.NOT_AN_INTEGER),
        ("NaN", Problem.NOT_AN_INTEGER),
        ("-Infinity", Problem.NOT_AN_INTEGER),
        ("1e400", Problem.NOT_AN_INTEGER),
        ("2e0", Problem.NOT_AN_INTEGER),
        ("2.5", Problem.NOT_AN_INTEGER),
        ("2.00000000000000000001", Problem.NOT_AN_INTEGER),
        ('"0-3"', Problem.NOT_AN_INTEGER),
        ('"2 or 3"', Problem.NOT_AN_INTEGER),
        ('"\u0662"', Problem.NOT_AN_INTEGER),
        ('""', Problem.NOT_AN_INTEGER),
        ("[2]", Problem.NOT_AN_INTEGER),
        ("[0, 1, 2, 3]", Problem.NOT_AN_INTEGER),
        ("null", Problem.MISSING_ATTRIBUTE),
        ("4", Problem.OUTSIDE_GRADE_SPACE),
        ("-1", Problem.OUTSIDE_GRADE_SPACE),
        ("2" * 5000, Problem.NOT_AN_INTEGER),
    ],
)
def test_a_value_that_is_no_grade_is_named_and_costs_itself_only(value: str, problem: Problem) -> None:
    answer = read(OBJECT.replace(": 2", f": {value}"))
    assert answer.grades_problem is problem
    assert answer.grades == {"Depth of lesion": 1}
    assert answer.bbox is not None


@pytest.mark.parametrize(
    "scores",
    [
        '{"Size of lesion": 2, "Size of lesion": 2, "Depth of lesion": 1}',
        '{"Size of lesion": 2, "size": 3, "Depth of lesion": 1}',
        '{"SIZE": 2, "size_of_lesion": 2, "depth": 1}',
    ],
)
def test_an_attribute_given_twice_earns_nothing_under_any_spelling(scores: str) -> None:
    answer = read(f'{{"{CARTILAGE.entity}": {scores}}}')
    assert answer.grades_problem is Problem.DUPLICATE_KEY
    assert answer.grades == {}


@pytest.mark.parametrize(
    ("bbox", "problem"),
    [
        ("[5, 2, 10, 29, 20, 49]", Problem.BOX_INVERTED),
        ("[15, 0, 95, 0, 95, 0]", Problem.BOX_INVERTED),
        ("[2, 5, 10, 29, 20]", Problem.BOX_NOT_SIX_INTEGERS),
        ("[2, 5, 10, 29, 20, 49.5]", Problem.BOX_NOT_SIX_INTEGERS),
        ("[2, 5, 10, 29, 20, NaN]", Problem.BOX_NOT_SIX_INTEGERS),
        ("[2, 5, 10, 29, 20, true]", Problem.BOX_NOT_SIX_INTEGERS),
        ('"2, 5, 10, 29, 20, 49"', Problem.BOX_NOT_SIX_INTEGERS),
        ("null", Problem.MISSING_BOX),
    ],
)
def test_a_bad_box_is_named_and_does_not_spoil_good_grades(bbox: str, problem: Problem) -> None:
    answer = read(OBJECT.replace(str(BOX), bbox))
    assert answer.bbox_problem is problem
    assert answer.bbox is None
    assert answer.grades == GRADES


def test_two_boxes_in_one_object_earn_nothing() -> None:
    answer = read(OBJECT[:-1] + f', "bounding_box": {BOX}}}')
    assert answer.bbox_problem is Problem.DUPLICATE_KEY
    assert answer.grades == GRADES


def test_grades_of_another_region_earn_nothing() -> None:
    other = QUESTIONS[20]
    answer = read(json.dumps({"MOAKS_scores": {other.entity: GRADES}}))
    assert answer.grades == {}
    assert answer.grades_problem is Problem.UNKNOWN_KEY
    snake = read(json.dumps({"femur_medial_posterior_cartilage_lesion.size": 2}))
    assert snake.grades == {}


def test_the_box_of_another_structure_is_not_the_asked_one() -> None:
    answer = read(json.dumps({CARTILAGE.entity: GRADES, "PCL": {"bbox": BOX}}))
    assert answer.bbox is None
    assert answer.grades == GRADES


def test_an_echoed_prompt_earns_nothing() -> None:
    prompt = (
        "Cartilage: size 0-3, depth 0-3. Answer as "
        '{"bbox": [start_slice, end_slice, x_min, x_max, y_min, y_max], "MOAKS_scores": '
        '{"femur medial central cartilage lesion": {"Size of lesion": <0-3>, "Depth of lesion": <0-3>}}}'
    )
    for text in (prompt, f"<think>{prompt}</think><answer>{prompt}</answer>", prompt * 3):
        answer = read(text)
        assert answer.grades == {}
        assert answer.bbox is None


def test_the_tolerant_reader_still_tells_whether_the_format_was_kept() -> None:
    strict = f"<think>thin</think><answer>{OBJECT}</answer>"
    assert read(strict).strict
    assert not read(OBJECT).strict
    assert read_answer(f"<answer>{OBJECT}</answer>", CARTILAGE, mode="tolerant", reasoning="none").strict
    assert read(strict.replace("[2, 5", "[5, 2")).strict
