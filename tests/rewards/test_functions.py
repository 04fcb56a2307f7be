"""What each shipped reward pays for, and what it never pays for."""

from collections.abc import Callable
from typing import Any

import pytest

from rewards import (
    QUESTIONS,
    Answer,
    Box3D,
    Example,
    Problem,
    Truth,
    answer_matches_reasoning,
    box_giou,
    box_iou,
    box_iou_threshold,
    box_size_validity,
    difficulty_calibrated_accuracy,
    format_answer,
    length_calibrated_accuracy,
    moaks_accuracy,
    output_format,
    read_answer,
    repetition,
    rule_violations,
    soft_overlong,
)

BOX = Box3D(2, 6, 10, 30, 20, 50)
Make = Callable[..., Example]


def gold(example: Example) -> Answer:
    text = format_answer(example.question, example.truth.grades, example.truth.bbox, reasoning="thin")
    return read_answer(text, example.question, shape=example.volume.shape)


@pytest.mark.parametrize("question_id", QUESTIONS)
def test_the_true_answer_scores_full_marks(question_id: int, make_example: Make) -> None:
    example = make_example(question_id)
    answer = gold(example)
    assert output_format(answer) == 1.0
    assert moaks_accuracy(answer, example.truth, example.question) == 1.0
    assert box_iou(answer, example.truth) == 1.0
    assert box_giou(answer, example.truth) == 1.0
    assert rule_violations(answer, example.question, example) == 0.0


def test_accuracy_is_the_share_of_graded_attributes_answered_exactly() -> None:
    truth = Truth({"a": 2, "b": 1, "c": 0}, None)
    assert moaks_accuracy(Answer({"a": 2, "b": 1, "c": 0}), truth, QUESTIONS[1]) == 1.0
    assert moaks_accuracy(Answer({"a": 2, "b": 0, "c": 0}), truth, QUESTIONS[1]) == pytest.approx(2 / 3)
    assert moaks_accuracy(Answer({"a": 2}), truth, QUESTIONS[1]) == pytest.approx(1 / 3)
    assert moaks_accuracy(Answer(), truth, QUESTIONS[1]) == 0.0


def test_what_the_group_finds_hard_counts_more() -> None:
    truth = Truth({"easy": 1, "hard": 2}, None)
    easy, hard, both, neither = ({"easy": 1}, {"hard": 2}, {"easy": 1, "hard": 2}, {})
    group = [Answer(grades) for grades in (easy, easy, both, hard, neither, easy)]
    # wrong answers plus one: 3 for the easy attribute, 5 for the hard one
    expected = [3 / 8, 3 / 8, 1, 5 / 8, 0, 3 / 8]
    assert difficulty_calibrated_accuracy(group, truth) == pytest.approx(expected)
    assert difficulty_calibrated_accuracy(group[2:3] * 3, truth) == [1, 1, 1]
    assert difficulty_calibrated_accuracy(group, Truth({}, BOX)) is None


def test_of_two_right_answers_the_shorter_counts_more_and_a_wrong_one_gains_nothing() -> None:
    truth = Truth({"a": 1, "b": 2}, None)
    right, half, wrong = Answer({"a": 1, "b": 2}), Answer({"a": 1}), Answer({})
    group, texts = [right, right, right, half, wrong], ["x" * n for n in (30, 20, 10, 10, 10)]
    assert length_calibrated_accuracy(group, texts, truth) == pytest.approx([0.75, 0.875, 1, 0.5, 0])
    assert length_calibrated_accuracy([right, right], ["x", "y"], truth) == [1, 1]
    assert length_calibrated_accuracy(group, texts, Truth({}, BOX)) is None
    with pytest.raises(ValueError, match=r"discount must be in \[0, 1\), got 1"):
        length_calibrated_accuracy(group, texts, truth, discount=1)


@pytest.mark.parametrize("question_id", QUESTIONS)
def test_no_short_answer_beats_a_long_one_with_more_right_grades(question_id: int) -> None:
    names = [attribute.name for attribute in QUESTIONS[question_id].attributes]
    truth = Truth(dict.fromkeys(names, 1), None)
    answers = [Answer(dict.fromkeys(names[:n], 1)) for n in range(len(names) + 1)]
    texts = ["x" * (1 + n * n) for n in range(len(answers))]
    for fewer, more in zip(range(len(names)), range(1, len(names) + 1), strict=True):
        pair = length_calibrated_accuracy(answers[fewer : more + 1], texts[fewer : more + 1], truth)
        assert pair is not None
        assert pair[0] < pair[1]


def test_a_near_miss_earns_no_more_than_a_far_one() -> None:
    """Partial credit makes the collapse to grade 0 pay more: most grades are 0."""
    truth = Truth({"a": 1}, None)
    assert (
        moaks_accuracy(Answer({"a": 0}), truth, QUESTIONS[1])
        == moaks_accuracy(Answer({"a": 3}), truth, QUESTIONS[1])
        == 0.0
    )


def test_ordinal_credit_is_paid_on_ordinal_attributes_only(make_example: Make) -> None:
    def earned(question_id: int, true: dict[str, int], answered: dict[str, int]) -> float | None:
        question = QUESTIONS[question_id]
        return moaks_accuracy(Answer(answered), Truth(true, None), question, ordinal_credit=True)

    assert earned(16, {"Size of lesion": 1}, {"Size of lesion": 3}) == pytest.approx(1 / 3)
    assert earned(16, {"Size of lesion": 3}, {"Size of lesion": 0}) == 0.0
    assert earned(16, {"Size of lesion": 3}, {}) == 0.0
    assert earned(48, {"morphology": 2}, {"morphology": 3}) == 0.0  # nominal
    assert earned(62, {"Signal Abnormality": 1}, {"Signal Abnormality": 0}) == 0.0  # binary


def test_answering_what_was_not_graded_earns_nothing() -> None:
    assert moaks_accuracy(Answer({"a": 2, "b": 1}), Truth({"a": 1}, None), QUESTIONS[1]) == 0.0


def test_not_applicable_is_none_and_not_zero() -> None:
    assert moaks_accuracy(Answer(), Truth({}, BOX), QUESTIONS[1]) is None
    assert box_iou(Answer(), Truth({"a": 1}, None)) is None
    assert box_giou(Answer(), Truth({"a": 1}, None)) is None


def test_an_unreadable_box_scores_zero_and_is_not_left_out() -> None:
    assert box_iou(Answer(), Truth({}, BOX)) == box_giou(Answer(), Truth({}, BOX)) == 0.0


@pytest.mark.parametrize("numbers", ["[15, 0, 95, 0, 95, 0]", "[5, 2, 29, 10, 49, 20]"])
@pytest.mark.parametrize("mode", ["strict", "tolerant"])
def test_an_inverted_box_scores_zero(numbers: str, mode: Any) -> None:
    """One formula in public use pays 26 for the inverted image and 2 for the inverted true box."""
    question = QUESTIONS[44]
    good = format_answer(question, {"grade": 1}, BOX, reasoning="a")
    answer = read_answer(good.replace(str(BOX.to_text()), numbers), question, mode=mode)
    assert answer.bbox_problem is Problem.BOX_INVERTED
    assert box_iou(answer, Truth({}, BOX)) == box_giou(answer, Truth({}, BOX)) == 0.0


def test_a_box_that_leaves_the_volume_pays_for_the_voxels_outside() -> None:
    outside = Answer(bbox=Box3D(2, 6, 10, 30, 20, 110), bbox_problem=Problem.BOX_OUTSIDE_VOLUME)
    assert box_iou(outside, Truth({}, BOX)) == pytest.approx(30 / 90)


def test_giou_still_tells_near_from_far_when_boxes_miss() -> None:
    truth = Truth({}, BOX)
    near, far = Answer(bbox=Box3D(2, 6, 31, 51, 20, 50)), Answer(bbox=Box3D(2, 6, 75, 95, 20, 50))
    assert box_iou(near, truth) == box_iou(far, truth) == 0.0
    assert 0.0 < box_giou(far, truth) < box_giou(near, truth) < 0.5  # type: ignore[operator]


@pytest.mark.parametrize(
    "completion",
    [
        "<think></think><answer></answer>",
        "<",
        "<think>a</think><answer>{}</answer><answer>{}</answer>",
        "<think><answer>{}</answer></think>",
        "acl or meniscus or pcl",
        "m",
        "",
    ],
)
@pytest.mark.parametrize("mode", ["strict", "tolerant"])
def test_texts_that_fool_public_rewards_earn_nothing(completion: str, mode: Any, make_example: Make) -> None:
    example = make_example(60)
    answer = read_answer(completion, example.question, mode=mode)
    assert output_format(answer) == 0.0
    assert moaks_accuracy(answer, example.truth, example.question) == 0.0
    assert box_iou(answer, example.truth) == 0.0


@pytest.mark.parametrize("value", ["true", "NaN", "1e400", '"0-3"', "[0, 1, 2, 3]", '"one"'])
@pytest.mark.parametrize("mode", ["strict", "tolerant"])
def test_values_that_are_no_grade_never_match_a_true_grade_of_one(
    value: str, mode: Any, make_example: Make
) -> None:
    example = make_example(44)
    text = format_answer(example.question, {"grade": 1}, BOX, reasoning="a").replace(
        '"grade": 1', f'"grade": {value}'
    )
    assert (
        moaks_accuracy(read_answer(text, example.question, mode=mode), example.truth, example.question) == 0.0
    )


def test_rule_violations_counts_contradictions_of_size_zero(make_example: Make) -> None:
    bml = make_example(1)
    size, number, percent = (attribute.name for attribute in bml.question.attributes)
    for grades, share in (((0, 0, 0), 0.0), ((0, 1, 0), 0.5), ((0, 1, 2), 1.0), ((1, 0, 0), 0.0)):
        answer = Answer(dict(zip((size, number, percent), grades, strict=True)))
        assert rule_violations(answer, bml.question, bml) == share
    cartilage = make_example(16)
    answer = Answer({"Size of lesion": 0, "Depth of lesion": 1})
    assert rule_violations(answer, cartilage.question, cartilage) == 1.0


def test_progressive_maceration_needs_an_earlier_visit(make_example: Make) -> None:
    answer = Answer({"morphology": 7})
    for visit, share in (("00M", 1.0), ("12M", 0.0)):
        example = make_example(48, visit=visit)
        assert rule_violations(answer, example.question, example) == share


def test_unreadable_grades_violate_every_rule(make_example: Make) -> None:
    example = make_example(44)
    assert rule_violations(read_answer("x", example.question), example.question, example) == 1.0


def test_soft_overlong_rises_over_the_last_characters() -> None:
    lengths = (100, 150, 175, 200, 500)
    assert [soft_overlong("x" * n, max_chars=200, cache_chars=50) for n in lengths] == [
        0.0,
        0.0,
        0.5,
        1.0,
        1.0,
    ]
    assert [soft_overlong("x" * n, max_chars=200, cache_chars=0) for n in (200, 201)] == [0.0, 1.0]


def test_the_bar_for_a_box_is_met_at_the_threshold(make_example: Make) -> None:
    truth = Truth({}, BOX)
    half = Answer(bbox=Box3D(2, 4, 10, 30, 20, 50))
    assert box_iou(half, truth) == 0.5
    assert box_iou_threshold(half, truth, threshold=0.5) == 1.0
    assert box_iou_threshold(half, truth, threshold=0.51) == 0.0
    assert box_iou_threshold(Answer(), truth) == 0.0
    assert box_iou_threshold(half, Truth({}, None)) is None
    with pytest.raises(ValueError, match="threshold must be in"):
        box_iou_threshold(half, truth, threshold=0.0)  # every box would do


def test_box_size_is_judged_axis_by_axis_wherever_the_box_is() -> None:
    truth = Truth({}, BOX)  # 4 x 20 x 30
    for box, share in (
        (Box3D(8, 12, 60, 80, 60, 90), 1.0),
        (Box3D(8, 10, 60, 100, 60, 90), 1.0),
        (Box3D(8, 9, 60, 101, 60, 90), 1 / 3),
        (Box3D(0, 16, 0, 96, 0, 96), 0.0),
    ):
        assert box_size_validity(Answer(bbox=box), truth) == pytest.approx(share)
    assert box_size_validity(Answer(), truth) == 0.0
    assert box_size_validity(Answer(), Truth({}, None)) is None
    with pytest.raises(ValueError, match="factor must be at least 1"):
        box_size_validity(Answer(), truth, factor=float("nan"))


def test_repetition_is_the_share_of_runs_of_words_said_before() -> None:
    assert repetition("one two three") == 0.0
    assert repetition("the femur shows one lesion and the tibia shows none") == 0.0
    assert repetition("no lesion here no lesion here", words=3) == pytest.approx(1 / 4)
    assert repetition("No lesion. " * 500) > 0.99
    assert repetition("<think>a b c d</think><answer>a b c d a b c d</answer>", words=4) == 0.0
    with pytest.raises(ValueError, match="words must be at least 1"):
        repetition("a", words=0)


@pytest.mark.parametrize(
    ("reasoning", "share"),
    [
        ("Size of lesion: 2, Depth of lesion: 1.", 1.0),
        ('The "size of lesion" is grade 2; **Depth of lesion** = 1', 1.0),
        ("Size of lesion 2 and nothing on the other", 0.5),
        ("Size of lesion: 2. Later: Size of lesion: 3. Depth of lesion: 1", 0.5),
        ("Size of lesion: 2.5, Depth of lesion: 12", 0.0),
        ("Size of lesion: 2-3, Depth of lesion is 1", 0.5),
        ("the size of the lesion is below 2", 0.0),
        ("", 0.0),
    ],
)
def test_reasoning_and_answer_agree_when_each_stated_grade_is_the_answered_one(
    reasoning: str, share: float
) -> None:
    answer = Answer({"Size of lesion": 2, "Depth of lesion": 1}, reasoning=reasoning)
    assert answer_matches_reasoning(answer, QUESTIONS[16]) == share


def test_a_grade_that_was_stated_but_not_answered_does_not_agree() -> None:
    assert answer_matches_reasoning(Answer({}, reasoning="Size of lesion: 2"), QUESTIONS[16]) == 0.0
