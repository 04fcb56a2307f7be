"""Measures that stand beside the endpoints, without intervals: what a reviewer looks at when two runs differ.

Grades, by attribute and averaged over the attributes of a column:

| measure | definition | source |
|---|---|---|
| balanced_accuracy | recall averaged over the grades that occur in the truth | as the endpoint |
| macro_f1 | F1 averaged over the grades that occur in the truth | scikit-learn `f1_score` |
| kappa | quadratic-weighted kappa, ordinal attributes only | scikit-learn `cohen_kappa_score` |
| mae | mean distance from the true grade, ordinal attributes only | |

An answer that cannot be read is wrong: for F1 a class of its own, for kappa and mae the grade farthest from the true
one. Kappa is undefined, and left out, where truth and answers are one and the same grade throughout.

Boxes, over the items of a structure that have a true box (an unread box has IoU 0 and no distance): median IoU, share
of IoU at least .25, .5 and .75, mean distance of the centres in mm. Items of a column: share with every attribute
right. All items: share of read answers that contradict a certain MOAKS rule, correlation of IoU with the share of
right grades.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import polars as pl
from sklearn.metrics import cohen_kappa_score, f1_score

from rl.bench.endpoints import CATEGORIES, OVERALL, TABLE2_COLUMNS, TABLE3_COLUMNS, Cell, grades_of

UNREAD = -1
IOU_BARS = (0.25, 0.5, 0.75)
_BY_ATTRIBUTE = {
    "attribute_id": pl.Int64(),
    "question_id": pl.Int64(),
    "attribute": pl.String(),
    "scale": pl.String(),
    "grade_space": pl.String(),
    "table2_column": pl.String(),
    "category": pl.String(),
    "n": pl.Int64(),
    "accuracy": pl.Float64(),
    "balanced_accuracy": pl.Float64(),
    "macro_f1": pl.Float64(),
    "kappa": pl.Float64(),
    "mae": pl.Float64(),
    "recall": pl.List(pl.Float64()),
}
"""Columns of `by_attribute`: facts, then measures; `recall` has an entry for each grade of the space."""
GRADE_COLUMNS = tuple(dict.fromkeys((OVERALL, *TABLE2_COLUMNS, *CATEGORIES)))
_FACTS = 7

Values = dict[str, dict[str, Cell]]
"""measure -> column -> cell."""


def further_measures(table: pl.DataFrame, attributes: pl.DataFrame, items: pl.DataFrame) -> Values:
    """All of the above for every column, empty ones included.

    Args:
        table: `by_attribute(attributes)`.
        attributes, items: frames of `rl.bench.metrics.Graded`.
    """
    return {**_grade_measures(table), **_box_measures(items), **_item_measures(attributes, items)}


def recall_per_grade(attributes: pl.DataFrame) -> dict[str, dict[str, dict[int, Cell]]]:
    """Column -> grade space ("ordinal 0-3") -> grade -> share of its true occurrences that were answered right."""
    known = attributes.lazy().filter(pl.col("truth").is_not_null())
    by = ("table2_column", "category", "grade_space", "truth")
    counted = known.group_by(by).agg(pl.len().alias("n"), pl.col("correct").sum()).collect()
    found: dict[str, dict[str, dict[int, Cell]]] = {column: {} for column in GRADE_COLUMNS}
    for column, spaces in found.items():
        of_grade = counted.filter(_inside(column)).group_by("grade_space", "truth")
        totals = of_grade.agg(pl.col("n", "correct").sum()).sort("grade_space", "truth")
        for space, grade, n, right in totals.iter_rows():
            spaces.setdefault(space, {})[grade] = Cell(right / n, n)
    return found


def by_attribute(attributes: pl.DataFrame) -> pl.DataFrame:
    """One row per attribute with a truth: the columns of `_BY_ATTRIBUTE`.

    A measure that is undefined is null, and so is the recall of a grade that does not occur in the truth.
    """
    known = attributes.lazy().filter(pl.col("truth").is_not_null())
    rows = []
    facts = list(_BY_ATTRIBUTE)[:_FACTS]
    # what each true grade was answered with, and how often: the measures need no more of an attribute
    answered_with = known.group_by([*facts, "truth", "predicted"], maintain_order=True).len().collect()
    for key, frame in answered_with.group_by(facts, maintain_order=True):
        row = dict(zip(facts, key, strict=True))
        truth, often = frame["truth"].to_numpy(), frame["len"].to_numpy()
        read = frame["predicted"].fill_null(UNREAD).to_numpy()
        grades = grades_of(row["grade_space"])
        right = truth == read
        recall = {int(g): float(np.average(right[truth == g], weights=often[truth == g])) for g in set(truth)}
        row |= {
            "n": int(often.sum()),
            "accuracy": float(np.average(right, weights=often)),
            "balanced_accuracy": math.fsum(recall.values()) / len(recall),
            "recall": [recall.get(grade) for grade in grades],
            "macro_f1": f1_score(
                truth, read, labels=np.unique(truth), average="macro", zero_division=0, sample_weight=often
            ),
        }
        if row["scale"] == "ordinal":
            farthest = np.where(truth > grades[-1] / 2, grades[0], grades[-1])
            answered = np.where(read == UNREAD, farthest, read)
            row |= {
                "kappa": _kappa(truth, answered, grades, often),
                "mae": float(np.average(np.abs(answered - truth), weights=often)),
            }
        rows.append(row)
    return pl.DataFrame(rows, schema=_BY_ATTRIBUTE)


def _grade_measures(table: pl.DataFrame) -> Values:
    values: Values = {name: {} for name in ("macro_f1", "kappa", "mae")}
    for column in GRADE_COLUMNS:
        for measure, cells in values.items():
            defined = table.filter(_inside(column) & pl.col(measure).is_not_null())
            cells[column] = Cell(_number(defined[measure].mean()), int(defined["n"].sum()))
    return values


def _inside(column: str) -> pl.Expr:
    """Whether an attribute or item counts in a column of Table 2, or in a category."""
    return (pl.col("table2_column") == column) | (pl.col("category") == column) | pl.lit(column == OVERALL)


def _box_measures(items: pl.DataFrame) -> Values:
    measures: dict[str, pl.Expr] = {
        "iou_median": pl.col("iou").median(),
        **{f"iou_{bar:.2f}": (pl.col("iou") >= bar).mean() for bar in IOU_BARS},
        "distance_mm": pl.col("distance_mm").mean(),
    }
    values: Values = {name: {} for name in measures}
    # lazy: only the columns that are needed are copied
    known = items.lazy().filter(pl.col("iou").is_not_null())
    for column, boxes in _structures(known.select("iou", "distance_mm", "table3_column").collect()):
        observed = dict.fromkeys(measures, boxes.height) | {"distance_mm": boxes["distance_mm"].count()}
        for name, value in boxes.select(**measures).row(0, named=True).items():
            values[name][column] = Cell(_number(value), observed[name])
    return values


def _item_measures(attributes: pl.DataFrame, items: pl.DataFrame) -> Values:
    graded = items.lazy().filter(pl.col("all_correct").is_not_null())
    in_column = {
        column: graded.filter(_inside(column)).select("all_correct").collect()["all_correct"]
        for column in GRADE_COLUMNS
    }
    violates = items["violates"].drop_nulls()
    known = attributes.lazy().filter(pl.col("truth").is_not_null())
    share = known.group_by("example_id").agg(pl.col("correct").mean())
    boxes = items.lazy().filter(pl.col("iou").is_not_null())
    both = boxes.join(share, on="example_id").select("iou", "correct").collect()
    linked = both.select(pl.corr("iou", "correct")).item() if both.height > 1 else None
    return {
        "all_correct": {
            column: Cell(_number(right.mean()), len(right)) for column, right in in_column.items()
        },
        "violations": {OVERALL: Cell(_number(violates.mean()), len(violates))},
        "iou_grade_correlation": {OVERALL: Cell(_number(linked), both.height)},
    }


def _structures(boxes: pl.DataFrame) -> Iterator[tuple[str, pl.DataFrame]]:
    yield OVERALL, boxes
    for structure in TABLE3_COLUMNS:
        yield structure, boxes.filter(pl.col("table3_column") == structure)


def _kappa(truth: np.ndarray, answered: np.ndarray, grades: range, often: np.ndarray) -> float | None:
    if len(np.unique([*truth, *answered])) == 1:
        return None
    return float(cohen_kappa_score(truth, answered, labels=grades, weights="quadratic", sample_weight=often))


def _number(value: object) -> float | None:
    return None if value is None or math.isnan(value) else float(value)  # type: ignore[arg-type]
