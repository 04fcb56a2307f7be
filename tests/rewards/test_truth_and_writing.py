"""The dataset's truths are read or refused by name; completions are written in the declared format only."""

import json
from typing import Any

import numpy as np
import pytest

from rewards import QUESTIONS, Box3D, format_answer, read_truth

BOX = [2, 5, 10, 29, 20, 49]
CYST = QUESTIONS[54]
CARTILAGE = QUESTIONS[19]


@pytest.mark.parametrize("as_text", [True, False], ids=["text", "parsed"])
@pytest.mark.parametrize(
    "truth",
    [
        {"medial_meniscal_cyst": {"presence": 1, "tear_location": 3}},
        {"MOAKS_scores": {"medial_meniscal_cyst": {"presence": "1", "tear_location": 3.0}}},
        {"medial_meniscal_cyst.presence": 1, "medial_meniscal_cyst.tear_location": 3},
        {"final_diagnosis": {"medial_meniscal_cyst": {"presence": 1, "tear_location": 3, "note": "x"}}},
    ],
)
def test_a_truth_is_read_in_every_released_shape(truth: dict[str, Any], as_text: bool) -> None:
    read = read_truth(json.dumps(truth) if as_text else truth, CYST)
    assert read.grades == {"presence": 1, "tear_location": 3}
    assert read.bbox is None
    boxed = {"bbox": BOX, **truth}
    assert read_truth(json.dumps(boxed) if as_text else boxed, CYST).bbox == Box3D.from_text(BOX)


def test_numpy_integers_of_a_parsed_file_are_integers() -> None:
    truth = {
        "medial_meniscal_cyst": {"presence": np.int64(1), "tear_location": np.int32(3)},
        "bbox": tuple(BOX),
    }
    assert read_truth(truth, CYST).grades == {"presence": 1, "tear_location": 3}


def test_what_was_not_graded_is_absent_and_not_zero() -> None:
    truth = read_truth({"medial_meniscal_cyst": {"presence": 1, "tear_location": None}, "bbox": None}, CYST)
    assert truth.grades == {"presence": 1}
    assert truth.bbox is None


@pytest.mark.parametrize(
    ("truth", "complaint"),
    [
        ("", "missing_answer"),
        ("no JSON here", "missing_answer"),
        ("{broken", "not_json"),
        ({}, "missing_grades"),
        ({"bbox": BOX}, "missing_grades"),
        ({"lateral_meniscal_cyst": {"presence": 1}}, r"unknown_key .*lateral_meniscal_cyst_presence"),
        ({"medial_meniscal_cyst": {"presence": 1, "where": 2}}, "unknown keys .*medial_meniscal_cyst_where"),
        ({"medial_meniscal_cyst": {"presence": 2, "tear_location": 0}}, "outside_grade_space"),
        ({"medial_meniscal_cyst": {"presence": True, "tear_location": 0}}, "not_an_integer"),
        ({"medial_meniscal_cyst": {"presence": float("nan"), "tear_location": 0}}, "not_an_integer"),
        ({"medial_meniscal_cyst": {"presence": float("inf"), "tear_location": 0}}, "not_an_integer"),
        ('{"presence": 1, "presence": 0, "tear_location": 0}', "duplicate_key"),
        ('{"presence": 1, "tear_location": 0} {"presence": 0, "tear_location": 0}', "several_answers"),
        (
            {"medial_meniscal_cyst": {"presence": 1, "tear_location": 0}, "bbox": BOX[::-1]},
            "bbox: box_inverted",
        ),
        ({"medial_meniscal_cyst": {"presence": 1, "tear_location": 0}, "bbox": [1, 2]}, "bbox: box_not_six"),
    ],
)
def test_an_unreadable_truth_is_refused_and_names_question_and_fault(truth: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=rf"question 54 \(medial_meniscal_cyst\).*{complaint}"):
        read_truth(truth, CYST)


def test_a_bottomless_truth_is_refused() -> None:
    truth: dict[str, Any] = {"presence": 1}
    for _ in range(50):
        truth = {"final_diagnosis": truth}
    with pytest.raises(ValueError, match="nested deeper"):
        read_truth(truth, CYST)


def test_completions_are_written_to_the_letter() -> None:
    grades = {"Depth of lesion": 1, "Size of lesion": 2}
    answer = (
        '<answer>{"bbox": [2, 5, 10, 29, 20, 49], "MOAKS_scores": '
        '{"femur medial central cartilage lesion": {"Size of lesion": 2, "Depth of lesion": 1}}}</answer>'
    )
    box = Box3D.from_text(BOX)
    assert format_answer(CARTILAGE, grades, box) == answer
    assert format_answer(CARTILAGE, grades, box, reasoning="thin") == f"<think>thin</think>{answer}"
    assert "bbox" not in format_answer(CARTILAGE, grades, None)


@pytest.mark.parametrize("grade", [4, -1, True, 2.0, "2"])
def test_a_grade_outside_its_space_is_not_written(grade: Any) -> None:
    with pytest.raises(ValueError, match="not a grade in"):
        format_answer(CARTILAGE, {"Size of lesion": grade}, None)


def test_an_attribute_the_question_lacks_is_not_written() -> None:
    with pytest.raises(ValueError, match="has no attribute 'grade'"):
        format_answer(CARTILAGE, {"grade": 1}, None)


@pytest.mark.parametrize("reasoning", ["", "  ", "...", "a </think> b", "a <answer> b"])
def test_reasoning_that_would_break_the_format_is_not_written(reasoning: str) -> None:
    with pytest.raises(ValueError, match="reasoning must have text"):
        format_answer(CARTILAGE, {"Size of lesion": 1}, None, reasoning=reasoning)
