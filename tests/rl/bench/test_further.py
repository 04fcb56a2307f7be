"""Measures beside the endpoints: their definitions, edge cases, and agreement with scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import polars as pl
import pytest
from sklearn.metrics import cohen_kappa_score, f1_score, mean_absolute_error, recall_score

from rewards.boxes import Box3D
from rewards.reading import format_answer
from rl.bench.answers import answer_row, make_run
from rl.bench.endpoints import OVERALL, Cell
from rl.bench.further import by_attribute
from rl.bench.metrics import grade_run, tables
from rl.bench.views import box_table, recall_table, structure_table, table3


@pytest.fixture
def graded(examples, answered):
    return grade_run(answered(examples(12, range(1, 70)), "SFT", 0.6, broken=0.1))


def test_kappa_f1_and_mae_of_read_answers_are_scikit_learns(examples, answered):
    graded = grade_run(answered(examples(12, range(1, 70)), "SFT", 0.6))
    for row in by_attribute(graded.attributes).iter_rows(named=True):
        frame = graded.attributes.filter(pl.col("attribute_id") == row["attribute_id"])
        truth, read = frame["truth"].to_numpy(), frame["predicted"].to_numpy()
        assert row["accuracy"] == pytest.approx(np.mean(truth == read))
        expected = f1_score(truth, read, labels=np.unique(truth), average="macro", zero_division=0)
        assert row["macro_f1"] == pytest.approx(expected)
        if row["scale"] != "ordinal":
            assert row["kappa"] is row["mae"] is None
        else:
            assert row["mae"] == pytest.approx(mean_absolute_error(truth, read))
            if row["kappa"] is not None:
                assert row["kappa"] == pytest.approx(
                    cohen_kappa_score(truth, read, weights="quadratic", labels=range(4))
                )


def test_recall_and_balanced_accuracy_of_an_attribute_are_scikit_learns(graded):
    for row in by_attribute(graded.attributes).iter_rows(named=True):
        frame = graded.attributes.filter(pl.col("attribute_id") == row["attribute_id"])
        truth, read = frame["truth"].to_numpy(), frame["predicted"].fill_null(-1).to_numpy()
        grades = range(len(row["recall"]))
        expected = recall_score(truth, read, labels=grades, average=None, zero_division=np.nan)
        assert [np.nan if r is None else r for r in row["recall"]] == pytest.approx(expected, nan_ok=True)
        assert row["balanced_accuracy"] == pytest.approx(np.nanmean(expected))


@pytest.mark.parametrize("column", ["Cartilage", "Menisci", "Others", "Ligaments and tendons"])
def test_recall_and_whole_answers_of_a_column_are_over_its_attributes_and_items(graded, column):
    result = tables(graded)
    inside = (pl.col("table2_column") == column) | (pl.col("category") == column)
    items = graded.items.filter(inside)
    cell = result.values["all_correct"][column]
    assert (cell.value, cell.n) == (pytest.approx(items["all_correct"].mean()), items.height)
    for space, recall in result.recall[column].items():
        for grade, cell in recall.items():
            true = graded.attributes.filter(
                inside & (pl.col("grade_space") == space) & (pl.col("truth") == grade)
            )
            assert (cell.value, cell.n) == (pytest.approx(true["correct"].mean()), true.height)


def test_a_column_without_items_has_no_recall_and_no_whole_answers(examples, answered):
    result = tables(grade_run(answered(examples(2, [1]), "SFT", 0.5)))
    assert result.recall["Periarticular"] == {}
    assert result.values["all_correct"]["Periarticular"] == Cell(None, 0)


def test_a_column_is_the_mean_over_its_attributes(graded):
    table, values = by_attribute(graded.attributes), tables(graded).values
    for measure in ("macro_f1", "kappa", "mae"):
        for column in ("Meniscus", "Menisci", "Cartilage"):
            inside = table.filter((pl.col("table2_column") == column) | (pl.col("category") == column))
            assert values[measure][column].value == pytest.approx(inside[measure].mean())
        assert values[measure][OVERALL].value == pytest.approx(table[measure].mean())
    assert values["kappa"]["Periarticular"].value is None  # binary attributes only
    assert values["macro_f1"]["Periarticular"].value is not None


def one_question(examples, meta, question_id, truths, predicted, boxes=None):
    """Truths and predicted grades of one single-attribute question; None is an answer that cannot be read."""
    rows = []
    for i, (example, true, said) in enumerate(
        zip(examples(len(truths), [question_id], visits=1), truths, predicted, strict=True)
    ):
        (name,) = (a.name for a in example.question.attributes)
        truth = type(example.truth)({name: true}, example.truth.bbox)
        example = type(example)(**{f: getattr(example, f) for f in example.__slots__} | {"truth": truth})
        box = boxes[i] if boxes else example.truth.bbox
        text = "?" if said is None else format_answer(example.question, {name: said}, box, "seen")
        rows.append(answer_row(example, text, "stop", "strict"))
    return grade_run(make_run(rows, meta("x", [question_id])))


def test_recall_has_a_row_for_each_grade_and_a_column_for_each_run(examples, meta):
    first = tables(one_question(examples, meta, 42, [0, 0, 1, 1], [0, 0, 1, None]))
    second = tables(one_question(examples, meta, 42, [0, 0, 1, 1], [0, 0, 0, 0]))
    view = recall_table({"SFT": first, "GRPO": second})
    assert view.columns == ("Grade", "SFT", "GRPO", "n")
    assert [row.cells for row in view.rows] == [
        ("ordinal 0-3: 0", "1.000", "1.000", "2"),
        ("ordinal 0-3: 1", "0.500", "0.000", "2"),
    ]


def test_an_unread_grade_is_as_wrong_as_can_be(examples, meta):
    unread = by_attribute(one_question(examples, meta, 42, [0, 1, 2, 3], [0, None, None, 3]).attributes).row(
        0, named=True
    )
    worst = by_attribute(one_question(examples, meta, 42, [0, 1, 2, 3], [0, 3, 0, 3]).attributes).row(
        0, named=True
    )
    assert unread["mae"] == worst["mae"] == 1.0
    assert unread["kappa"] == worst["kappa"]
    assert unread["macro_f1"] == 0.5  # grades 0 and 3 found, 1 and 2 not


def test_kappa_is_empty_where_it_is_undefined_and_0_for_a_constant_answer(examples, meta):
    same = tables(one_question(examples, meta, 42, [0, 0, 0], [0, 0, 0])).values
    assert same["kappa"][OVERALL].value is None
    assert same["macro_f1"][OVERALL].value == 1.0
    constant = tables(one_question(examples, meta, 42, [0, 1, 3], [0, 0, 0])).values
    assert constant["kappa"][OVERALL].value == 0.0


def test_recall_per_grade_counts_unread_as_missed(examples, meta):
    recall = tables(one_question(examples, meta, 42, [0, 0, 1, 1], [0, 0, 1, None])).recall
    recall = recall[OVERALL]["ordinal 0-3"]
    assert {grade: (cell.value, cell.n) for grade, cell in recall.items()} == {0: (1.0, 2), 1: (0.5, 2)}


def test_the_spread_of_boxes_is_over_all_true_boxes_and_distance_over_read_ones(examples, meta):
    true = [e.truth.bbox for e in examples(3, [42], visits=1)]
    half = Box3D(
        true[1].slice_min, true[1].slice_max, true[1].x_min, true[1].x_max, true[1].y_min, true[1].y_max
    )
    wider = Box3D(
        half.slice_min,
        half.slice_max,
        half.x_min,
        half.x_max + (half.x_max - half.x_min),
        half.y_min,
        half.y_max,
    )
    values = tables(one_question(examples, meta, 42, [0, 0, 0], [0, 0, None], [true[0], wider, None])).values
    shares = [values[f"iou_{bar}"][OVERALL].value for bar in ("0.25", "0.50", "0.75")]
    assert shares == pytest.approx([2 / 3, 2 / 3, 1 / 3])
    assert values["iou_median"][OVERALL].value == 0.5
    assert values["distance_mm"][OVERALL].value == pytest.approx((half.x_max - half.x_min) / 2 * 1.5 / 2)
    assert values["distance_mm"][OVERALL].n == 2
    assert values["iou_median"]["Synovitis"].n == 3
    assert values["iou_median"]["ACL"].value is None


def test_a_run_without_any_box_is_named_beside_its_ious(examples, answered, meta):
    said = {"asked": answered(examples(2, [42]), "asked", 0.5)}
    silent = [
        answer_row(e, format_answer(e.question, e.truth.grades, None, "x"), "stop", "strict")
        for e in examples(2, [42])
    ]
    by_run = {name: tables(grade_run(run)) for name, run in said.items()}
    both = by_run | {"silent": tables(grade_run(make_run(silent, meta("silent", [42]))))}
    for view in (table3, box_table, structure_table):
        assert "No box at all could be read of silent: were boxes asked for?" in view(both).note
        assert "No box" not in view(by_run).note


def test_rules_are_judged_on_read_answers_only(examples, meta):
    run_examples = examples(3, [16], visits=1)
    texts = [
        format_answer(
            run_examples[0].question,
            {"Size of lesion": 0, "Depth of lesion": 2},
            run_examples[0].truth.bbox,
            "x",
        ),
        format_answer(
            run_examples[1].question,
            {"Size of lesion": 0, "Depth of lesion": 0},
            run_examples[1].truth.bbox,
            "x",
        ),
        "?",
    ]
    rows = [answer_row(e, t, "stop", "strict") for e, t in zip(run_examples, texts, strict=True)]
    cell = tables(grade_run(make_run(rows, meta("x", [16])))).values["violations"][OVERALL]
    assert (cell.value, cell.n) == (0.5, 2)


def test_the_correlation_of_boxes_and_grades_is_empty_without_spread(examples, meta, graded):
    linked = tables(graded).values["iou_grade_correlation"][OVERALL]
    assert 0 < linked.value < 1  # an answer that cannot be read loses both
    flat = tables(one_question(examples, meta, 42, [0, 0], [0, 0])).values["iou_grade_correlation"][OVERALL]
    assert flat.value is None or math.isfinite(flat.value)
