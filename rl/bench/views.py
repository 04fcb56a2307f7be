"""The benchmark's tables as rows of text, once, for the console, Markdown and the report alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rl.bench import published
from rl.bench.baselines import BASELINE_MODEL, PRIOR_MODEL
from rl.bench.endpoints import CATEGORIES, OVERALL, TABLE2_COLUMNS, TABLE3_COLUMNS, Cell
from rl.bench.further import IOU_BARS
from rl.bench.meta import RunMeta, settings_words
from rl.bench.metrics import Tables

EMPTY = "empty"
"""Stands where a column has no observations."""
BOX_GIVEN = "box given"
"""Stands for measures of boxes of a run that was shown the true region."""
NOT_GIVEN = "–"
"""Stands where a published row has no figure."""
_BOX_MEASURES = (
    *("iou", "iou_median", *(f"iou_{bar:.2f}" for bar in IOU_BARS)),
    *("distance_mm", "iou_grade_correlation"),
)
_AGREEMENT = (("macro_f1", "macro-F1"), ("kappa", "kappa"), ("mae", "MAE"), ("all_correct", "all right"))
_GRADES_OF = {BASELINE_MODEL: "train-majority grade", PRIOR_MODEL: "grades as often as in training"}
"""How the grades of a baseline came about, by the model of its run."""


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a table; the first cell is its label."""

    cells: tuple[str, ...]
    kind: str = "run"
    """run | baseline | published | count | plain."""


@dataclass(frozen=True, slots=True)
class TableView:
    """A table ready to print. Every cell is plain text."""

    title: str
    note: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]


def all_views(by_run: Mapping[str, Tables]) -> list[TableView]:
    """Every table of the benchmark for these runs.

    Args:
        by_run: name -> tables, in the order of the rows; all on the same items.
    """
    return [
        table2(by_run),
        balanced_table(by_run),
        category_table(by_run),
        agreement_table(by_run),
        recall_table(by_run),
        table3(by_run),
        box_table(by_run),
        structure_table(by_run),
        reading_table(by_run),
    ]


def table2(by_run: Mapping[str, Tables]) -> TableView:
    """Table 2: accuracy per column, with the paper's rows."""
    columns = (*TABLE2_COLUMNS, OVERALL)
    rows = [
        Row(
            (*_values(name, t, "accuracy", columns, boxes=False), _cell(t.values["accuracy_macro"][OVERALL])),
            _kind(t.meta),
        )
        for name, t in by_run.items()
    ]
    rows += [_published_row(row, len(columns) + 1) for row in published.TABLE2]
    rows += _counts(by_run, "accuracy", columns, extra=1)
    return TableView(
        "Table 2: accuracy",
        f"{_header(by_run)}. Columns and Overall are the share of graded attributes answered right (micro); Macro is "
        "the mean over attributes. Paper rows: " + published.NOTE + ".",
        ("Run", *columns, "Macro"),
        tuple(rows),
    )


def balanced_table(by_run: Mapping[str, Tables]) -> TableView:
    """Balanced accuracy in the columns of Table 2."""
    columns = (*TABLE2_COLUMNS, OVERALL)
    measure, pooled = "balanced_accuracy", "balanced_accuracy_pooled"
    rows = [
        Row(
            (*_values(name, t, measure, columns, boxes=False), _cell(t.values[pooled][OVERALL])),
            _kind(t.meta),
        )
        for name, t in by_run.items()
    ]
    return TableView(
        "Balanced accuracy",
        f"{_header(by_run)}. Mean over attributes of the recall averaged over the grades that occur in the truth. "
        "Pooled: recall of each grade over all attributes of a grade space, averaged over grades and grade spaces.",
        ("Run", *columns, "Pooled"),
        (*rows, *_counts(by_run, measure, columns, extra=1)),
    )


def category_table(by_run: Mapping[str, Tables]) -> TableView:
    """Every grade measure in the paper's seven categories."""
    measures = (("accuracy", "accuracy"), ("balanced_accuracy", "balanced"), *_AGREEMENT)
    rows = _measure_rows(by_run, measures, CATEGORIES, boxes=False)
    return TableView(
        "The seven categories",
        f"{_header(by_run)}. Measures as in the tables of Table 2's columns; n: graded attributes.",
        ("Run", *CATEGORIES),
        (*rows, *_counts(by_run, "accuracy", CATEGORIES)),
    )


def table3(by_run: Mapping[str, Tables]) -> TableView:
    """Table 3: mean IoU per structure, with the paper's rows."""
    columns = (*TABLE3_COLUMNS, OVERALL)
    rows = [Row(_values(name, t, "iou", columns, boxes=True), _kind(t.meta)) for name, t in by_run.items()]
    rows += [_published_row(row, len(columns)) for row in published.TABLE3]
    rows += _counts(by_run, "iou", columns)
    return TableView(
        "Table 3: mean IoU of boxes",
        f"{_header(by_run)}. Overall is the mean over all items with a true box, those outside the seven structures "
        "included. " + _box_notes(by_run) + "Paper rows: " + published.NOTE + ".",
        ("Run", *columns),
        tuple(rows),
    )


def agreement_table(by_run: Mapping[str, Tables]) -> TableView:
    """Macro-F1, quadratic-weighted kappa, mean absolute error and answers without a wrong grade."""
    columns = (*TABLE2_COLUMNS, OVERALL)
    rows = _measure_rows(by_run, _AGREEMENT, columns, boxes=False)
    return TableView(
        "Agreement: macro-F1, kappa, MAE, all right",
        f"{_header(by_run)}. Means over attributes; quadratic-weighted kappa and mean absolute error over ordinal ones "
        "only, kappa where it is defined. An unread grade is wrong: as far from the true one as can be. All right: "
        "share of answers without a wrong grade.",
        ("Run", *columns),
        tuple(rows),
    )


def recall_table(by_run: Mapping[str, Tables]) -> TableView:
    """Recall of each grade over all attributes of a grade space."""
    spaces = next(iter(by_run.values())).recall[OVERALL]
    rows = []
    for space, grades in sorted(spaces.items(), reverse=True):
        for grade, cell in grades.items():
            recalls = (_cell(t.recall[OVERALL][space][grade]) for t in by_run.values())
            rows.append(Row((f"{space}: {grade}", *recalls, f"{cell.n:,}"), "plain"))
    return TableView(
        "Recall of each grade",
        f"{_header(by_run)}. Over all attributes of a grade space. A run that has collapsed has 1 in one row and 0 in "
        "the others. By column and by attribute: results.json.",
        ("Grade", *by_run, "n"),
        tuple(rows),
    )


def box_table(by_run: Mapping[str, Tables]) -> TableView:
    """How boxes are spread around their mean IoU."""
    rows = []
    for name, t in by_run.items():
        label = _values(name, t, "iou", (), boxes=True)[0]
        *cells, linked = (_value(t, measure, OVERALL) for measure in _BOX_MEASURES)
        measured = f"{t.values['distance_mm'][OVERALL].n:,}"
        rows.append(Row((label, *cells, measured, linked), _kind(t.meta)))
    return TableView(
        "Boxes: spread of IoU and distance",
        f"{_header(by_run)}. Over all items with a true box; an unread box has IoU 0 and no distance: "
        "distances are over as many boxes as stand beside them, and flatter a run with few. With grading: "
        f"correlation of an item's IoU with its share of right grades. {_box_notes(by_run)}".rstrip(),
        (
            "Run",
            "Mean IoU",
            "Median",
            *(f"IoU ≥ {bar:g}" for bar in IOU_BARS),
            "Centres apart, mm",
            "Of boxes",
            "With grading",
        ),
        tuple(rows),
    )


def structure_table(by_run: Mapping[str, Tables]) -> TableView:
    """Median IoU, shares and distance for each structure of Table 3."""
    columns = (*TABLE3_COLUMNS, OVERALL)
    shares = ((f"iou_{bar:.2f}", f"IoU ≥ {bar:g}") for bar in IOU_BARS)
    measures = (("iou_median", "median"), *shares, ("distance_mm", "mm apart"))
    rows = _measure_rows(by_run, measures, columns, boxes=True)
    return TableView(
        "Structures: spread of IoU and distance",
        f"{_header(by_run)}. An unread box has IoU 0 and no distance, which flatters "
        f"the distances of a run with many. {_box_notes(by_run)}".rstrip(),
        ("Run", *columns),
        (*rows, *_counts(by_run, "iou", columns)),
    )


def reading_table(by_run: Mapping[str, Tables]) -> TableView:
    """How much of the answers could be read, and what was left out."""
    rows = []
    for name, t in by_run.items():
        c = t.counts
        cells = (
            name,
            _cell(t.values["strict"][OVERALL]),
            f"{c['unread_grades']:,} of {c['graded_attributes']:,}",
            f"{c['unread_boxes']:,} of {c['true_boxes']:,}",
            f"{c['missing'] + c['errors']:,}",
            f"{c['truncated']:,}",
            _cell(t.values["violations"][OVERALL]),
            f"{c['missing_true_grades']:,}",
            f"{c['missing_true_boxes']:,}",
        )
        rows.append(Row(cells, _kind(t.meta)))
    return TableView(
        "Reading the answers",
        f"{_header(by_run)}. Unread grades and boxes count as wrong, those of items without any answer among them; a "
        "missing truth is left out. Rule broken: share of read answers that contradict a certain rule of MOAKS.",
        (
            "Run",
            "Strict",
            "Unread grades",
            "Unread boxes",
            "No answer",
            "At length limit",
            "Rule broken",
            "No true grade",
            "No true box",
        ),
        tuple(rows),
    )


def _header(by_run: Mapping[str, Tables]) -> str:
    """The header that all rows of a table share, and what their models were shown and asked.

    Raises:
        ValueError: no runs, or runs on different terms, which do not belong in one table.
    """
    headers = {t.header: name for name, t in by_run.items()}
    if len(headers) != 1:
        shown = "; ".join(f"{name}: {header}" for header, name in headers.items()) or "no runs"
        raise ValueError(f"a table takes runs on the same items, read in the same way; got {shown}")
    header = next(iter(headers))
    asked = {name: t.meta for name, t in by_run.items() if _kind(t.meta) == "run"}
    return "; ".join([capitalised(header), *([settings_words(asked)] if asked else [])])


def capitalised(words: str) -> str:
    """With its first letter as a sentence begins, the others as they are."""
    return words[0].upper() + words[1:]


def _kind(meta: RunMeta) -> str:
    return "baseline" if meta.model in _GRADES_OF else "run"


def _values(name: str, t: Tables, measure: str, columns: Sequence[str], *, boxes: bool) -> tuple[str, ...]:
    if t.meta.model in _GRADES_OF:
        name = f"{name} ({'train-mean box' if boxes else _GRADES_OF[t.meta.model]})"
    return (name, *(_value(t, measure, column) for column in columns))


def _measure_rows(
    by_run: Mapping[str, Tables], measures: Sequence[tuple[str, str]], columns: Sequence[str], *, boxes: bool
) -> list[Row]:
    """A row per measure, (key, words), and run."""
    return [
        Row(_values(f"{name}, {words}", t, measure, columns, boxes=boxes), _kind(t.meta))
        for measure, words in measures
        for name, t in by_run.items()
    ]


def _value(t: Tables, measure: str, column: str) -> str:
    given = t.meta.box_given and measure in _BOX_MEASURES
    return BOX_GIVEN if given else _cell(t.values[measure][column])


def _box_notes(by_run: Mapping[str, Tables]) -> str:
    """Whose boxes are no measure of localisation: boxes that were given, and none at all."""
    counts = {name: t.counts for name, t in by_run.items()}
    none = [name for name, c in counts.items() if 0 < c["true_boxes"] == c["unread_boxes"]]
    said = f"No box at all could be read of {', '.join(none)}: were boxes asked for? " if none else ""
    if any(t.meta.box_given for t in by_run.values()):
        said += "Box given: the run was shown the true region alone, so its boxes are not comparable. "
    return said


def _counts(by_run: Mapping[str, Tables], measure: str, columns: Sequence[str], extra: int = 0) -> list[Row]:
    """How many observations each column rests on; the same for all runs on the same items."""
    first = next((t for t in by_run.values() if not t.meta.box_given), next(iter(by_run.values())))
    cells = ("n", *(f"{first.values[measure][column].n:,}" for column in columns), *[""] * extra)
    return [Row(cells, "count")]


def _published_row(row: published.PublishedRow, width: int) -> Row:
    label = f"Paper: {row.model}" + (f", {row.setting}" if row.setting else "")
    values = [f"{v:.3f}" for v in row.values]
    return Row((label, *values, *[NOT_GIVEN] * (width - len(values))), "published")


def _cell(cell: Cell) -> str:
    return EMPTY if cell.value is None else f"{cell.value:.3f}"
