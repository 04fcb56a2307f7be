"""Grading a run and the tables of ReasonKnee-Bench.

Answers are read by `rewards.reading.read_answer` in the run's reader mode and boxes compared by `rewards.boxes`,
as in the reward: training and benchmark cannot drift apart. What is computed from the graded answers is
defined in `rl.bench.endpoints`.

An answer that cannot be read is wrong (grade) or IoU 0 (box), and counted. A missing truth is left out, and counted.
A column without observations is empty (`None`), never 0. So are the box measures of a run that was shown the true
region: an answer that gives back all it was shown has IoU 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import polars as pl

from rewards.boxes import Box3D, center_distance_mm, iou
from rewards.functions import rule_violations
from rewards.ontology import QUESTIONS, Question
from rewards.reading import read_answer
from rewards.types import Answer, Example, Problem
from rl.bench.answers import BATCH, ERROR, MISSING, BenchRun, examples_of, row_truth
from rl.bench.endpoints import Cell, count, endpoints, grades_of, value
from rl.bench.further import by_attribute, further_measures, recall_per_grade
from rl.bench.meta import RunMeta

ATTRIBUTE_SCORES = {"attribute_id": pl.Int64(), "truth": pl.Int64(), "predicted": pl.Int64()}
ITEM_COLUMNS = ("example_id", "item_hash", "patient_id", "volume_id", "question_id", "finish_reason")
ITEM_SCORES = {
    "iou": pl.Float64(),
    "distance_mm": pl.Float64(),
    "violates": pl.Boolean(),
    "box_read": pl.Boolean(),
    "grades_read": pl.Boolean(),
    "strict": pl.Boolean(),
    "all_correct": pl.Boolean(),
    "format_problem": pl.String(),
    "grades_problem": pl.String(),
    "bbox_problem": pl.String(),
}
_NO_NUMBER = pl.lit(None, pl.Float64())


@dataclass(frozen=True)
class Graded:
    """A graded run.

    `attributes`, one row per item and attribute: example_id, patient_id, attribute_id, truth (null: not graded),
    predicted (null: not read), correct (null where there is no truth), and by join question_id, attribute, scale,
    grade_space ("ordinal 0-3"), table2_column, category.

    `items`, one row per item: `ITEM_COLUMNS` of its answer, `ITEM_SCORES` (iou is null without a true box, 0 without
    a predicted one; distance_mm, of the centres, is null without either; violates, whether the grades break a rule of
    `rule_violations`, is null when they were not read; all_correct is null without any true grade), and by join
    table2_column, category, table3_column.
    """

    meta: RunMeta
    attributes: pl.DataFrame
    items: pl.DataFrame


@dataclass(frozen=True)
class Tables:
    """The benchmark's numbers of one run."""

    meta: RunMeta
    values: Mapping[str, Mapping[str, Cell]]
    """measure (`rl.bench.endpoints.MEASURES`, and those of `rl.bench.further`) -> column -> cell."""
    recall: Mapping[str, Mapping[str, Mapping[int, Cell]]]
    """`rl.bench.further.recall_per_grade`."""
    attributes: Sequence[Mapping[str, Any]]
    """One row per attribute (`rl.bench.further.by_attribute`)."""
    counts: Mapping[str, int]
    """items, patients, volumes, what was unread, what had no truth."""
    problems: Mapping[str, Mapping[str, int]]
    """format, grades, bbox -> problem -> number of items."""

    @property
    def header(self) -> str:
        """`RunMeta.answered`."""
        return self.meta.answered(self.counts["items"], self.counts["patients"])

    @property
    def failures(self) -> str:
        """What counted as wrong unread, and what was left out, in words."""
        c = self.counts
        unanswered = f", those of {c['missing']:,} unanswered and {c['errors']:,} failed items among them"
        return (
            f"{c['unread_grades']:,} of {c['graded_attributes']:,} grades and {c['unread_boxes']:,} of "
            f"{c['true_boxes']:,} boxes could not be read and count as wrong"
            f"{unanswered if c['missing'] or c['errors'] else ''}; {c['truncated']:,} answers hit the length "
            f"limit; left out for want of a truth: {c['missing_true_grades']:,} grades, "
            f"{c['missing_true_boxes']:,} boxes"
        )


def grade_run(run: BenchRun, batch: int = BATCH) -> Graded:
    """Read and grade every answer of a run.

    Args:
        run: the run.
        batch: answers that are Python objects at once; any number gives the same result.
    """
    parts = [_grade_batch(answers, run.meta) for answers in run.answers.iter_slices(batch)]
    attributes, items = (pl.concat(frames, rechunk=True) for frames in zip(*parts, strict=True))
    facts = attribute_facts()
    columns = facts.unique("question_id", maintain_order=True).select(
        "question_id", "table2_column", "category", "table3_column"
    )
    known = pl.col("truth").is_not_null()
    return Graded(
        run.meta,
        attributes.with_columns(
            correct=pl.when(known).then(pl.col("truth").eq_missing(pl.col("predicted")))
        ).join(facts, on="attribute_id", how="left", maintain_order="left"),
        items.join(columns, on="question_id", how="left", maintain_order="left"),
    )


@cache
def attribute_facts() -> pl.DataFrame:
    """The 118 attributes: attribute_id, question_id, attribute, scale, grade_space, and the columns they count in."""
    rows = [
        {
            "attribute_id": attribute_id(question_id, index),
            "question_id": question_id,
            "attribute": attribute.name,
            "scale": attribute.scale,
            "grade_space": f"{attribute.scale} {attribute.grades.start}-{attribute.grades.stop - 1}",
            "table2_column": question.table2_column,
            "category": question.category,
            "table3_column": question.table3_column,
        }
        for question_id, question in QUESTIONS.items()
        for index, attribute in enumerate(question.attributes)
    ]
    return pl.DataFrame(rows)


def attribute_id(question_id: int, index: int) -> int:
    """A number for the index-th attribute of a question."""
    return 10 * question_id + index


def without_ious(graded: Graded) -> Graded:
    """The same with no box compared to the true one."""
    return replace(graded, items=graded.items.with_columns(iou=_NO_NUMBER, distance_mm=_NO_NUMBER))


def on_equal_terms(a: Graded, b: Graded) -> tuple[Graded, Graded]:
    """Both without IoUs where one of them was given the true boxes; else as they are."""
    return (without_ious(a), without_ious(b)) if a.meta.box_given or b.meta.box_given else (a, b)


def tables(graded: Graded) -> Tables:
    """Every measure in every column, with what was counted, unread and left out."""
    items = (without_ious(graded) if graded.meta.box_given else graded).items
    counts = count(graded.attributes, items)
    n_total, s_total = counts.n.sum(axis=0), counts.s.sum(axis=0)
    values: dict[str, dict[str, Cell]] = {}
    for endpoint in endpoints(counts.cells):
        n, s = n_total @ endpoint.merge, s_total @ endpoint.merge
        observed = int(n.sum())
        cell = Cell(float(value(n, s, endpoint.group)) if observed else None, observed)
        values.setdefault(endpoint.measure, {})[endpoint.column] = cell
    table = by_attribute(graded.attributes)
    return Tables(
        graded.meta,
        {**values, **further_measures(table, graded.attributes, items)},
        recall_per_grade(graded.attributes),
        table.to_dicts(),
        _tally(graded),
        _problems(graded.items),
    )


def grade_histogram(graded: Graded) -> pl.DataFrame:
    """How often each grade is true and predicted: table2_column, grade_space, grade, true_count, predicted_count.

    Only attributes with a true grade are counted. `grade` is null for predictions that could not be read. Grades of
    the space that never occur are there with 0, so that a collapse shows.
    """
    known = graded.attributes.filter(pl.col("truth").is_not_null())
    by = ["table2_column", "grade_space"]
    true = known.group_by([*by, pl.col("truth").alias("grade")]).agg(pl.len().alias("true_count"))
    predicted = known.group_by([*by, pl.col("predicted").alias("grade")]).agg(
        pl.len().alias("predicted_count")
    )
    spaces = known.select(by).unique()
    grades = pl.DataFrame(
        [
            {"grade_space": space, "grade": grade}
            for space in sorted(spaces["grade_space"].unique())
            for grade in [*grades_of(space), None]
        ],
        schema={"grade_space": pl.String(), "grade": pl.Int64()},
    )
    return (
        spaces.join(grades, on="grade_space")
        .join(true, on=[*by, "grade"], how="left", nulls_equal=True)
        .join(predicted, on=[*by, "grade"], how="left", nulls_equal=True)
        .with_columns(pl.col("true_count", "predicted_count").fill_null(0))
        .sort([*by, "grade"], nulls_last=True)
    )


def read_row(row: Mapping[str, Any], meta: RunMeta) -> Answer:
    """The answer of a row of `answers.parquet` as it is graded."""
    return _read(row["completion"], QUESTIONS[row["question_id"]], row["shape"], row_truth(row).bbox, meta)


def _read(
    text: str, question: Question, shape: Sequence[int], true_box: Box3D | None, meta: RunMeta
) -> Answer:
    """The answer in the run's mode, its box in the file's grid.

    Boxes of a run that was shown true regions are counted from the lowest corner of the region, and moved.
    """
    region = true_box if meta.box_given else None
    slices, x, y = region.extents if region else shape
    answer = read_answer(text, question, mode=meta.reader, reasoning=meta.reasoning, shape=(slices, x, y))
    if region is None or answer.bbox is None:
        return answer
    return replace(answer, bbox=answer.bbox.shifted(*region.to_corners()[0]))


def _grade_batch(answers: pl.DataFrame, meta: RunMeta) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The rows of these answers in `Graded.attributes` and in `Graded.items`, without what comes by join."""
    rows, attributes, items = [], [], []
    # nothing but numbers and words outlives its turn: the garbage collector would walk through it again and again
    for row, (text, example) in enumerate(zip(answers["completion"], examples_of(answers), strict=True)):
        question, truth = example.question, example.truth.grades
        answer = _read(text, question, example.volume.shape, example.truth.bbox, meta)
        items.append(_score(answer, example))
        for index, attribute in enumerate(question.attributes):
            name = attribute.name
            rows.append(row)
            attributes.append(
                (attribute_id(question.question_id, index), truth.get(name), answer.grades.get(name))
            )
    return (
        answers.select("example_id", "patient_id")[rows].hstack(_columns(attributes, ATTRIBUTE_SCORES)),
        answers.select(ITEM_COLUMNS).hstack(_columns(items, ITEM_SCORES)),
    )


def _columns(rows: Iterable[tuple[Any, ...]], schema: Mapping[str, pl.DataType]) -> pl.DataFrame:
    return pl.DataFrame(dict(zip(schema, zip(*rows, strict=True), strict=True)), schema=schema)


def _score(answer: Answer, example: Example) -> tuple[Any, ...]:
    """What `ITEM_SCORES` names."""
    box, truth = answer.bbox, example.truth
    overlap, distance = None if truth.bbox is None else 0.0, None
    if box is not None and truth.bbox is not None:
        overlap = iou(box, truth.bbox)
        distance = center_distance_mm(box, truth.bbox, example.volume.spacing_mm)
    grades_read = answer.grades_problem is Problem.NONE
    return (
        overlap,
        distance,
        rule_violations(answer, example.question, example) > 0 if grades_read else None,
        box is not None,
        len(answer.grades) == len(example.question.attributes),
        answer.strict,
        truth.grades.items() <= answer.grades.items() if truth.grades else None,
        answer.format_problem.value,
        answer.grades_problem.value,
        answer.bbox_problem.value,
    )


def _tally(graded: Graded) -> dict[str, int]:
    attributes, items = graded.attributes, graded.items
    has_grade, has_box = attributes["truth"].is_not_null(), items["iou"].is_not_null()
    return {
        "items": items.height,
        "patients": items["patient_id"].n_unique(),
        "volumes": items["volume_id"].n_unique(),
        "graded_attributes": int(has_grade.sum()),
        "missing_true_grades": int((~has_grade).sum()),
        "true_boxes": int(has_box.sum()),
        "missing_true_boxes": int((~has_box).sum()),
        "unread_grades": int((has_grade & attributes["predicted"].is_null()).sum()),
        "unread_boxes": int((has_box & ~items["box_read"]).sum()),
        "not_strict": int((~items["strict"]).sum()),
        "truncated": int((items["finish_reason"] == "length").sum()),
        "missing": int((items["finish_reason"] == MISSING).sum()),
        "errors": int((items["finish_reason"] == ERROR).sum()),
    }


def _problems(items: pl.DataFrame) -> dict[str, dict[str, int]]:
    found = {}
    for part in ("format", "grades", "bbox"):
        column = f"{part}_problem"
        seen = items.filter(pl.col(column) != Problem.NONE.value)[column].value_counts(sort=True)
        found[part] = dict(seen.iter_rows())
    return found
