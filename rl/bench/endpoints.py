"""What the benchmark measures, as sums over patients: one definition for tables, intervals and tests.

Every endpoint is a mean of rates. A *cell* holds a count n and a sum s (of correct grades, or of IoU) for each
patient; a cell's rate is s / n over all patients. An endpoint averages the rates of its cells inside groups, then
the groups; cells without observations are left out of their group, groups without cells out of the mean.

| endpoint | cells | groups |
|---|---|---|
| accuracy (micro) | one: every graded attribute of the column | one |
| accuracy_macro | one per attribute | one per attribute |
| balanced_accuracy | one per attribute and true grade | one per attribute |
| balanced_accuracy_pooled | one per grade space and true grade | one per grade space |
| iou | one: every item of the structure that has a true box | one |
| strict | one: every item | one |

So `balanced_accuracy` of a column is the mean over its attributes of scikit-learn's `balanced_accuracy_score`:
recall averaged over the grades that occur in the truth. An attribute with a single true grade counts with the recall
of that grade, which a constant answer gets for free; the pooled form (recall per grade over all attributes of the
column that share a grade space, 0-3 ordinal say) needs no attribute to show every grade, and is steadier when
grades are rare.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

FloatArray = npt.NDArray[np.float64]

OVERALL = "Overall"
TABLE2_COLUMNS = ("BML", "Cartilage", "Osteophyte", "Meniscus", "Others")
CATEGORIES = (
    "BML",
    "Cartilage",
    "Osteophytes",
    "Menisci",
    "Ligaments and tendons",
    "Synovitis and effusion",
    "Periarticular",
)
SAME_COLUMNS = {"Osteophytes": "Osteophyte", "Menisci": "Meniscus"}
"""Category -> the column of Table 2 that holds the same attributes under another name."""
TABLE3_COLUMNS = ("Patella", "Femur", "Tibia", "Meniscus", "ACL", "PCL", "Synovitis")
GRADE_MEASURES = ("accuracy", "accuracy_macro", "balanced_accuracy", "balanced_accuracy_pooled")
MEASURES = (*GRADE_MEASURES, "iou", "strict")


@dataclass(frozen=True, slots=True)
class Cell:
    """One entry of a table; `value` is None where there was nothing to measure."""

    value: float | None
    n: int
    """Observations: graded attributes, or items."""


@dataclass(frozen=True)
class Endpoint:
    """One number of the benchmark, e.g. balanced accuracy of the BML column."""

    measure: str
    column: str
    merge: npt.NDArray[np.float64]
    """[base cells, cells], 1 where a base cell belongs to a cell of this endpoint."""
    group: npt.NDArray[np.float64]
    """[cells, groups], 1 where a cell belongs to a group."""


@dataclass(frozen=True)
class Counts:
    """Per-patient sums over the base cells. Base cells: attribute x true grade, structure, strict parse."""

    patients: tuple[str, ...]
    cells: tuple[tuple[Any, ...], ...]
    n: FloatArray
    """[patients, base cells], observations."""
    s: FloatArray
    """[patients, base cells], sum of correct grades, of IoU, or of strictly parsed answers."""


def count(attributes: pl.DataFrame, items: pl.DataFrame) -> Counts:
    """Sums per patient and base cell from the frames of `rl.bench.metrics.Graded`.

    A base cell is ("grade", attribute_id, grade, table2_column, category, grade_space), ("iou", structure or None)
    or ("strict",). Missing truths are left out here.
    """
    # lazy: only the columns that are needed are copied
    graded = attributes.lazy().filter(pl.col("truth").is_not_null())
    facts = ["attribute_id", "truth", "table2_column", "category", "grade_space"]
    pieces = [
        ("grade", facts, graded, "correct"),
        ("iou", ["table3_column"], items.lazy().filter(pl.col("iou").is_not_null()), "iou"),
        ("strict", [], items.lazy(), "strict"),
    ]
    # maintain_order keeps the float sums, and so the tables, the same from run to run
    sums = [
        frame.group_by("patient_id", pl.lit(kind).alias("kind"), *by, maintain_order=True)
        .agg(pl.len().alias("n"), pl.col(value).cast(pl.Float64).sum().alias("s"))
        .collect()
        for kind, by, frame, value in pieces
    ]
    seen = [found.drop("patient_id", "n", "s").unique() for found in sums]
    cells = tuple(sorted((cell for frame in seen for cell in frame.iter_rows()), key=repr))
    place = {cell: c for c, cell in enumerate(cells)}
    patients = items.select("patient_id").unique().sort("patient_id").with_row_index("patient")
    n, s = np.zeros((2, patients.height, len(cells)))
    for found, kinds in zip(sums, seen, strict=True):
        numbered = kinds.with_columns(cell=pl.Series([place[k] for k in kinds.iter_rows()], dtype=pl.Int64()))
        placed = found.join(numbered, on=kinds.columns, nulls_equal=True).select(
            "patient_id", "cell", "n", "s"
        )
        at = placed.join(patients, on="patient_id")
        index = at["patient"].to_numpy(), at["cell"].to_numpy()
        n[index], s[index] = at["n"].to_numpy(), at["s"].to_numpy()
    return Counts(tuple(patients["patient_id"]), cells, n, s)


def endpoints(cells: Sequence[tuple[Any, ...]]) -> list[Endpoint]:
    """All endpoints over these base cells, empty columns included."""
    found = []
    for column in dict.fromkeys((OVERALL, *TABLE2_COLUMNS, *CATEGORIES)):
        chosen = [c[0] == "grade" and column in (OVERALL, c[3], c[4]) for c in cells]
        for measure, key, group in _GRADE_KEYS:
            found.append(_endpoint(measure, column, cells, chosen, key, group))
    for column in (OVERALL, *TABLE3_COLUMNS):
        chosen = [c[0] == "iou" and column in (OVERALL, c[1]) for c in cells]
        found.append(_endpoint("iou", column, cells, chosen, _one, _one))
    found.append(_endpoint("strict", OVERALL, cells, [c[0] == "strict" for c in cells], _one, _one))
    return found


def parse_endpoint(name: str) -> tuple[str, str]:
    """(measure, column) of an endpoint as it is configured: `balanced_accuracy`, or `iou/Femur` for one column."""
    measure, _, column = name.partition("/")
    return measure, column or OVERALL


def grades_of(grade_space: str) -> range:
    """The grades of a space as it is named: "ordinal 0-3"."""
    first, last = grade_space.split()[-1].split("-")
    return range(int(first), int(last) + 1)


def value(n: FloatArray, s: FloatArray, group: FloatArray) -> FloatArray:
    """The endpoint from the totals of its cells; works on any leading shape, e.g. bootstrap draws.

    Args:
        n: [..., cells] observations.
        s: [..., cells] sums. For the difference of two runs on the same items give the difference of their sums.
        group: [cells, groups].

    Returns:
        [...] mean over groups of the mean rate of their cells; nan where nothing was observed.
    """
    weights = cell_weights(n, group)
    result: FloatArray = np.where(
        (n > 0).any(axis=-1), np.sum(weights * s / np.maximum(n, 1), axis=-1), np.nan
    )
    return result


def cell_weights(n: FloatArray, group: FloatArray) -> FloatArray:
    """[..., cells] weight of each cell's rate in the endpoint; 0 for cells without observations."""
    present = (n > 0).astype(np.float64)
    per_group = present @ group
    groups = (per_group > 0).sum(axis=-1, keepdims=True)
    share = (per_group > 0) / np.maximum(per_group, 1) / np.maximum(groups, 1)
    weights: FloatArray = present * (share @ group.T)
    return weights


_Key = Callable[[tuple[Any, ...]], Any]


def _one(cell: tuple[Any, ...]) -> int:
    return 0


def _attribute(cell: tuple[Any, ...]) -> Any:
    return cell[1]


def _attribute_and_grade(cell: tuple[Any, ...]) -> Any:
    return cell[1:3]


def _space_and_grade(cell: tuple[Any, ...]) -> Any:
    return cell[5], cell[2]


def _space(cell: tuple[Any, ...]) -> Any:
    return cell[5]


_GRADE_KEYS: tuple[tuple[str, _Key, _Key], ...] = (
    ("accuracy", _one, _one),
    ("accuracy_macro", _attribute, _attribute),
    ("balanced_accuracy", _attribute_and_grade, _attribute),
    ("balanced_accuracy_pooled", _space_and_grade, _space),
)
"""measure, what makes a cell, what makes a group."""


def _endpoint(
    measure: str,
    column: str,
    cells: Sequence[tuple[Any, ...]],
    chosen: Sequence[bool],
    key: _Key,
    group: _Key,
) -> Endpoint:
    keys = {key(c): group(c) for c, keep in zip(cells, chosen, strict=True) if keep}
    cell_index = {k: i for i, k in enumerate(keys)}
    group_index = {g: i for i, g in enumerate(dict.fromkeys(keys.values()))}
    merge = np.zeros((len(cells), len(keys)))
    groups = np.zeros((len(keys), len(group_index)))
    for c, (cell, keep) in enumerate(zip(cells, chosen, strict=True)):
        if keep:
            merge[c, cell_index[key(cell)]] = 1
    for k, g in keys.items():
        groups[cell_index[k], group_index[g]] = 1
    return Endpoint(measure, column, merge, groups)
