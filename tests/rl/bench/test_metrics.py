"""The tables agree with independent implementations, and say what they left out."""

from __future__ import annotations

import dataclasses

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, balanced_accuracy_score, recall_score

from rewards.boxes import Box3D
from rewards.functions.box_iou import box_iou
from rewards.functions.moaks_accuracy import moaks_accuracy
from rewards.ontology import QUESTIONS
from rewards.reading import format_answer, read_answer
from rewards.types import Problem, Truth
from rl.bench.answers import answer_row, make_run, row_truth
from rl.bench.endpoints import CATEGORIES, GRADE_MEASURES, OVERALL, TABLE2_COLUMNS, TABLE3_COLUMNS, Cell
from rl.bench.metrics import grade_histogram, grade_run, read_row, tables

SHAPE = (16, 48, 40)
"""(slices, x, y) of the volumes of `examples`."""


@pytest.fixture(scope="module")
def graded(examples, answered):
    return grade_run(answered(examples(12, range(1, 70)), "SFT", 0.6, seed=3, broken=0.05))


@pytest.fixture(scope="module")
def values(graded):
    return tables(graded).values


UNREAD = -1


def by_attribute(graded, column=None):
    frame = graded.attributes
    if column is not None:
        frame = frame.filter((frame["table2_column"] == column) | (frame["category"] == column))
    for _, rows in frame.group_by("attribute_id", maintain_order=True):
        yield rows["truth"].to_numpy(), rows["predicted"].fill_null(UNREAD).to_numpy()


@pytest.mark.parametrize("column", [None, *TABLE2_COLUMNS, *CATEGORIES])
@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
def test_accuracies_agree_with_scikit_learn(graded, values, column):
    values = {m: values[m][column or OVERALL].value for m in GRADE_MEASURES}
    pairs = list(by_attribute(graded, column))
    truth, predicted = (np.concatenate(x) for x in zip(*pairs, strict=True))
    assert values["accuracy"] == pytest.approx(accuracy_score(truth, predicted))
    assert values["accuracy_macro"] == pytest.approx(np.mean([accuracy_score(*p) for p in pairs]))
    assert values["balanced_accuracy"] == pytest.approx(np.mean([balanced_accuracy_score(*p) for p in pairs]))


def test_the_pooled_form_is_recall_per_grade_of_a_grade_space(graded, values):
    truth, predicted = (np.concatenate(x) for x in zip(*by_attribute(graded, "BML"), strict=True))
    recalls = recall_score(truth, predicted, average=None, labels=[0, 1, 2, 3])
    assert values["balanced_accuracy_pooled"]["BML"].value == pytest.approx(np.mean(recalls))


def test_mean_iou_is_taken_over_the_items_of_a_structure(graded, values):
    items = graded.items
    for structure in TABLE3_COLUMNS:
        expected = items.filter(items["table3_column"] == structure)["iou"].mean()
        assert values["iou"][structure].value == pytest.approx(expected)
    assert values["iou"][OVERALL].value == pytest.approx(items["iou"].mean())


def test_boxes_and_grades_score_as_in_the_reward(examples, answered):
    """The trainer's own reward functions, called on the same answers, give the benchmark's numbers."""
    run = answered(examples(4, range(1, 70)), "SFT", 0.6, broken=0.05)
    graded = grade_run(run)
    right = graded.attributes.group_by("example_id", maintain_order=True).agg(pl.col("correct").mean())[
        "correct"
    ]
    for row, overlap, share in zip(
        run.answers.iter_rows(named=True), graded.items["iou"], right, strict=True
    ):
        answer = read_answer(
            row["completion"], QUESTIONS[row["question_id"]], mode="strict", reasoning="required"
        )
        truth = row_truth(row)
        assert box_iou(answer=answer, truth=truth) == overlap
        assert moaks_accuracy(answer, truth, QUESTIONS[row["question_id"]]) == pytest.approx(share)


@pytest.mark.parametrize("batch", [1, 7, 10_000])
def test_grading_in_batches_gives_what_grading_at_once_gives(examples, answered, batch):
    run = answered(examples(3, [1, 16, 42, 48]), "SFT", 0.6, broken=0.2)
    whole, parts = grade_run(run, batch=run.meta.n), grade_run(run, batch=batch)
    assert parts.items.equals(whole.items)
    assert parts.attributes.equals(whole.attributes)


def one_item_run(meta, example, completion, reader="strict", finish_reason="stop"):
    run_meta = dataclasses.replace(meta("x"), reader=reader)
    return make_run([answer_row(example, completion, finish_reason, reader)], run_meta)


def test_an_unreadable_answer_is_wrong_and_counted(examples, meta):
    example = examples(1, [1], visits=1)[0]
    result = tables(grade_run(one_item_run(meta, example, "no idea", finish_reason="length")))
    assert result.values["accuracy"][OVERALL].value == 0
    assert result.values["iou"][OVERALL].value == 0
    assert result.values["strict"][OVERALL].value == 0
    assert (result.counts["unread_grades"], result.counts["unread_boxes"], result.counts["truncated"]) == (
        3,
        1,
        1,
    )
    assert sum(result.problems["format"].values()) == 1
    assert "3 of 3 grades and 1 of 1 boxes could not be read and count as wrong" in result.failures


def test_a_bad_box_does_not_spoil_good_grades(examples, meta):
    example = examples(1, [42], visits=1)[0]
    completion = format_answer(example.question, example.truth.grades, None, "Looked.")
    result = tables(grade_run(one_item_run(meta, example, completion)))
    assert result.values["accuracy"][OVERALL].value == 1
    assert result.values["iou"][OVERALL].value == 0


def test_a_missing_truth_is_left_out_and_counted(examples, meta):
    example = examples(1, [1], visits=1)[0]
    known = QUESTIONS[1].attributes[0].name
    truth = Truth({known: 2}, None)
    completion = format_answer(example.question, {known: 2}, Box3D(0, 1, 0, 1, 0, 1), "Looked.")
    result = tables(grade_run(one_item_run(meta, dataclasses.replace(example, truth=truth), completion)))
    assert result.values["accuracy"][OVERALL] == dataclasses.replace(
        result.values["accuracy"][OVERALL], value=1.0, n=1
    )
    assert result.values["iou"][OVERALL].value is None
    assert (result.counts["missing_true_grades"], result.counts["missing_true_boxes"]) == (2, 1)


def test_an_empty_column_is_empty_and_not_zero(examples, answered):
    result = tables(grade_run(answered(examples(2, [1]), "SFT", 0.5)))
    assert result.values["accuracy"]["Periarticular"].value is None
    assert result.values["accuracy"]["Meniscus"].value is None
    assert result.values["iou"]["ACL"].value is None


def test_the_tolerant_reader_reads_more_and_the_strict_rate_stands_beside_it(examples, meta):
    example = examples(1, [42], visits=1)[0]
    completion = format_answer(example.question, example.truth.grades, example.truth.bbox, "Looked.")
    fenced = f"Sure!\n```json\n{completion.partition('<answer>')[2].removesuffix('</answer>')}\n```"
    strict = tables(grade_run(one_item_run(meta, example, fenced)))
    tolerant = tables(grade_run(one_item_run(meta, example, fenced, "tolerant")))
    assert strict.values["accuracy"][OVERALL].value == 0
    assert tolerant.values["accuracy"][OVERALL].value == 1
    assert tolerant.values["strict"][OVERALL].value == 0


@st.composite
def region_and_box(draw: st.DrawFn) -> tuple[Box3D, Box3D]:
    """A region of the file's grid, and a box inside it."""
    limits: list[list[int]] = [[], []]
    for size in SHAPE:
        inside = sorted(draw(st.lists(st.integers(0, size), min_size=4, max_size=4)))
        low, start, end, high = inside
        start, end = min(start, size - 1), max(end, min(start, size - 1) + 1)
        limits[0] += [min(low, start), max(high, end)]
        limits[1] += [start, end]
    return Box3D(*limits[0]), Box3D(*limits[1])


@given(both=region_and_box())
def test_a_box_written_in_the_grid_of_its_true_region_is_graded_in_that_of_the_file(
    both: tuple[Box3D, Box3D], examples, meta
):
    region, box = both
    example = examples(1, [42], visits=1)[0]
    example = dataclasses.replace(example, truth=dataclasses.replace(example.truth, bbox=region))
    (s, x, y), _ = region.to_corners()
    said = format_answer(example.question, example.truth.grades, box.shifted(-s, -x, -y), "Looked.")
    whole, cut = meta("x"), dataclasses.replace(meta("x"), image="true_region")
    row = make_run([answer_row(example, said, "stop", "strict")], cut).answers.row(0, named=True)
    assert row["completion"] == said
    answer = read_row(row, cut)
    assert (answer.bbox, answer.bbox_problem, answer.grades) == (box, Problem.NONE, example.truth.grades)
    assert read_row(row, whole).bbox == box.shifted(-s, -x, -y)


def test_a_box_that_leaves_its_true_region_is_flagged(examples, meta):
    example = examples(1, [42], visits=1)[0]
    region = example.truth.bbox
    outside = Box3D.from_corners((0, 0, 0), tuple(n + 1 for n in region.extents))
    said = format_answer(example.question, example.truth.grades, outside, "Looked.")
    cut = dataclasses.replace(meta("x"), image="true_region")
    row = make_run([answer_row(example, said, "stop", "strict")], cut).answers.row(0, named=True)
    assert read_row(row, cut).bbox_problem is Problem.BOX_OUTSIDE_VOLUME


def test_the_iou_of_a_run_that_was_shown_the_true_region_is_in_no_table(examples, answered_cut_out):
    """Each answer gives back all it was shown: the items say IoU 1, which is worth nothing."""
    graded = grade_run(answered_cut_out(examples(2, [1, 42]), "x"))
    assert graded.items["iou"].unique().to_list() == [1.0]
    result = tables(graded)
    for measure in ("iou", "iou_median", "iou_0.50", "distance_mm", "iou_grade_correlation"):
        assert result.values[measure][OVERALL] == Cell(None, 0)
    assert result.values["accuracy"][OVERALL].value == 1
    assert (result.counts["true_boxes"], result.counts["unread_boxes"]) == (graded.items.height, 0)


def test_a_collapse_to_grade_0_shows_in_the_histogram(examples, answered):
    graded = grade_run(answered(examples(6, range(16, 30)), "collapsed", 0.0))
    rows = grade_histogram(graded).rows_by_key("grade", named=True)
    assert rows[0][0]["predicted_count"] == 6 * 2 * 14 * 2
    assert [rows[g][0]["predicted_count"] for g in (1, 2, 3, None)] == [0, 0, 0, 0]
    assert rows[3][0]["true_count"] > 0


def test_the_header_names_test_file_question_set_reader_and_size(graded):
    header = tables(graded).header
    for words in (
        "test.json",
        "69 questions (1-69)",
        "strict reader",
        "1,656 items of 12 patients",
    ):
        assert words in header
