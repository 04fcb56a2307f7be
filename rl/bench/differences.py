"""Tables of differences: every endpoint for every pair of runs, what the pairs say together, and the few that count."""

from __future__ import annotations

from collections.abc import Sequence

from rl.bench.arms import ArmComparison, correction, p_words, pairs_of
from rl.bench.compare import (
    MEASURE_NAMES,
    POWER,
    Comparison,
    Difference,
    corrected,
    detectable,
    outcome,
    outcome_of,
    primary_and_usual,
    signed,
)
from rl.bench.endpoints import SAME_COLUMNS
from rl.bench.intervals import Interval
from rl.bench.meta import settings_words
from rl.bench.seeds import MIN_SEEDS, SeedSummary
from rl.bench.views import Row, TableView, capitalised

BENCHMARK_PATIENTS = 399
"""Patients of the released test split."""
WITHHELD = "withheld"
SHOWN_MEASURES = ("balanced_accuracy", "accuracy", "iou", "strict")


def shown_endpoints(comparison: Comparison) -> list[tuple[str, str]]:
    """(measure, column) of what tables and plots show; `results.json` has all."""
    return [
        (d.measure, d.column)
        for measure in SHOWN_MEASURES
        for d in comparison.differences
        if d.measure == measure and d.column not in SAME_COLUMNS
    ]


def differences_table(comparisons: Sequence[ArmComparison]) -> TableView:
    """The differences of every pair of runs, by endpoint."""
    pairs = pairs_of(comparisons)
    first = pairs[0]
    level = f"{first.confidence:.0%}"
    several = len(pairs) > 1
    rows = [
        Row(
            (_name(*key), *([_of(pair.a.name, pair.b.name)] if several else []), *_cells(d, pair.confidence)),
            "plain",
        )
        for key in shown_endpoints(first)
        for pair in pairs
        if (d := pair.get(*key)) is not None
    ]
    names = ("Pair", "Reference", "Arm") if several else (first.a.name, first.b.name)
    title = (
        "Differences of each pair of runs" if several else f"Differences, {first.b.name} minus {first.a.name}"
    )
    return TableView(
        title,
        f"{_answered(comparisons)}. "
        f"{level} intervals: bootstrap-t over patients, {first.draws:,} draws, seed {first.seed}. "
        "p: patient-level sign-flip test; Holm: corrected over "
        f"{correction(len(pairs), 'pairs of runs')}. {_outcome_note(first)} {_power_note(first)}".rstrip(),
        ("Endpoint", *names, "Difference", f"{level} interval", "p", "Holm", "Outcome", "n", "Patients"),
        tuple(rows),
    )


def settings_of_pairs(comparisons: Sequence[ArmComparison]) -> str:
    """What the compared runs were shown and asked."""
    return settings_words({run.name: run for pair in pairs_of(comparisons) for run in (pair.b, pair.a)})


def _answered(comparisons: Sequence[ArmComparison]) -> str:
    """What every table says first, the same for all that is compared."""
    pair = comparisons[0].pairs[0]
    words = pair.b.answered(pair.n_items, pair.n_patients)
    return f"{capitalised(words)}; {settings_of_pairs(comparisons)}"


def _outcome_note(comparison: Comparison) -> str:
    level = f"{1 - comparison.confidence:.2g}"
    return f"Won and lost go by the interval; Holm > {level} marks those that the correction takes back."


def seeds_table(comparisons: Sequence[ArmComparison]) -> TableView | None:
    """What the pairs of each arm say of the method; None when no arm has several seeds."""
    summaries = [(arm, s) for arm in comparisons for s in arm.over_seeds]
    if not summaries:
        return None
    pair = comparisons[0].pairs[0]
    seeds = len(comparisons[0].pairs)
    rows = [
        Row(
            (
                _name(*key),
                _of(arm.a, arm.b),
                ", ".join(map(signed, s.differences)),
                *_over_seeds(s, pair.confidence),
            ),
            "plain",
        )
        for key in shown_endpoints(pair)
        for arm in comparisons
        if (s := arm.over(*key)) is not None
    ]
    claim = "" if seeds >= MIN_SEEDS else f"No claim is made with fewer than {MIN_SEEDS} seeds. "
    return TableView(
        f"Differences over {seeds} training seeds",
        f"{_answered(comparisons)}. "
        f"Each difference of a pair of runs is one observation. {claim}Interval: Student's t, df {seeds - 1}; p: "
        f"paired t-test; Holm: corrected over {correction(len(comparisons), 'arms')}. They speak of the methods "
        f"trained again, on these patients. {_outcome_note(pair)}",
        (
            "Endpoint",
            "Arms",
            "By seed",
            "Mean",
            "SD between seeds",
            f"{pair.confidence:.0%} t interval",
            "p",
            "Holm",
            "Outcome",
        ),
        tuple(rows),
    )


def headline_table(comparisons: Sequence[ArmComparison]) -> TableView:
    """The endpoints of the verdict for every pair and every method, few enough for a terminal."""
    first = comparisons[0].pairs[0]
    rows = []
    for key in primary_and_usual(first):
        for arm in comparisons:
            for pair in arm.pairs:
                if (d := pair.get(*key)) is not None:
                    _, _, *cells, _, _ = _cells(d, first.confidence)
                    rows.append(Row((_name(*key), _of(pair.a.name, pair.b.name), *cells), "plain"))
            if (s := arm.over(*key)) is not None:
                mean, _, *cells = _over_seeds(s, first.confidence)
                arms = f"{_of(arm.a, arm.b)}, {len(arm.pairs)} seeds"
                rows.append(Row((_name(*key), arms, mean, *cells)))
    level = f"{first.confidence:.0%}"
    return TableView(
        "Differences",
        f"{_answered(comparisons)}. "
        f"{level} intervals: of a pair of runs bootstrap-t over patients, about those checkpoints; of seeds Student's "
        f"t, about the method. {_outcome_note(first)} The report has every column, and says what Holm's correction "
        "covers.",
        ("Endpoint", "Arms", "Difference", f"{level} interval", "p", "Holm", "Outcome"),
        tuple(rows),
    )


def _name(measure: str, column: str) -> str:
    return f"{MEASURE_NAMES[measure]}, {column}"


def _of(a: str, b: str) -> str:
    return f"{b} − {a}"


def _interval(interval: Interval) -> str:
    return f"{signed(interval.low)} to {signed(interval.high)}"


def _cells(d: Difference, confidence: float) -> tuple[str, ...]:
    return (
        f"{d.a:.3f}",
        f"{d.b:.3f}",
        signed(d.difference),
        _interval(d.interval),
        p_words(d.p_value),
        p_words(d.p_holm),
        corrected(outcome(d), d.p_holm, confidence),
        f"{d.n:,}",
        f"{d.n_patients:,}",
    )


def _over_seeds(s: SeedSummary, confidence: float) -> tuple[str, ...]:
    """Mean, standard deviation, interval, p, Holm, outcome."""
    spread = (signed(s.mean), f"{s.sd:.3f}")
    if s.interval is None or s.p_value is None or s.p_holm is None:
        return (*spread, *[WITHHELD] * 3, "no claim")
    tests = (p_words(s.p_value), p_words(s.p_holm))
    result = corrected(outcome_of(s.interval), s.p_holm, confidence)
    return (*spread, _interval(s.interval), *tests, result)


def _power_note(comparison: Comparison) -> str:
    """What this test set, and one as large as the benchmark's, could have shown with this pair's spread."""
    found = []
    for key in primary_and_usual(comparison):
        d = comparison.get(*key)
        if d is not None and d.n_patients > 1:
            here, there = (
                detectable(d, n, comparison.confidence) for n in (d.n_patients, BENCHMARK_PATIENTS)
            )
            found.append(
                f"{MEASURE_NAMES[d.measure]}, {d.column}: {here:.3f} with these {d.n_patients:,} patients, "
                f"{there:.3f} with the {BENCHMARK_PATIENTS} of the benchmark's test split"
            )
    of = f"{comparison.b.name} minus {comparison.a.name}"
    return (
        f"True differences of {of} that are found in {POWER:.0%} of cases: {'; '.join(found)}."
        if found
        else ""
    )
