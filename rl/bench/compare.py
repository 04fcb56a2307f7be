"""Did B do better than A? Two runs on the same items, compared patient by patient.

Differences are B minus A. The unit is the patient: visits and questions of one patient are no independent evidence.
An interval over patients speaks about this pair of checkpoints; a claim about the method needs several training
seeds (`rl.bench.seeds`, t interval over seeds).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import polars as pl
from scipy.stats import norm

from rewards.errors import ReasonKneeError
from rl.bench.answers import HASHED, BenchRun
from rl.bench.endpoints import (
    MEASURES,
    OVERALL,
    SAME_COLUMNS,
    Endpoint,
    count,
    endpoints,
    parse_endpoint,
    value,
)
from rl.bench.holm import holm_by_measure
from rl.bench.intervals import (
    Interval,
    Resampled,
    bca_interval,
    bootstrap_t_interval,
    jackknife_t_interval,
    percentile_interval,
    resample,
)
from rl.bench.meta import RunMeta, settings_words
from rl.bench.metrics import Graded, grade_run, on_equal_terms
from rl.config import CompareConfig

PATIENTS_FOR_A_CLAIM = 10
"""Below this many patients no interval is worth a verdict."""

POWER = 0.8
"""Of the note on what a test set could show."""


class CompareError(ReasonKneeError, ValueError):
    """Two runs that must not be compared; the message names the differing fields and items."""


@dataclass(frozen=True, slots=True)
class Difference:
    """One endpoint in both runs."""

    measure: str
    column: str
    a: float
    b: float
    difference: float
    """b - a."""
    interval: Interval
    """Symmetric bootstrap-t over patients; the three that follow stand beside it (`rl.bench.intervals`)."""
    jackknife: Interval
    percentile: Interval
    bca: Interval
    p_value: float
    """Patient-level sign-flip test, two-sided, not corrected for the number of columns."""
    p_holm: float
    """The same corrected by Holm's method over all that was compared at once (`holm_by_measure`)."""
    n: int
    """Observations: graded attributes, or items."""
    n_patients: int
    """Patients with an observation."""
    se: float
    """Standard error of the difference over patients."""


@dataclass(frozen=True)
class Comparison:
    """Two runs on the same items. `differences` holds every endpoint that has observations."""

    a: RunMeta
    b: RunMeta
    differences: tuple[Difference, ...]
    n_items: int
    n_patients: int
    confidence: float
    draws: int
    seed: int
    primary_endpoint: str
    """Measure the verdict is about, or measure/column; declared in the config before the run."""

    def get(self, measure: str, column: str = OVERALL) -> Difference | None:
        """The difference of one endpoint; None when its column is empty."""
        return next((d for d in self.differences if (d.measure, d.column) == (measure, column)), None)


def compare(a: BenchRun, b: BenchRun, settings: CompareConfig, seed: int = 0) -> Comparison:
    """Compare two runs, item by item, with intervals over patients.

    Raises:
        CompareError: see `compare_graded`.
    """
    check_same_items(a, b)
    return compare_graded(grade_run(a), grade_run(b), settings, seed)


def check_same_items(a: BenchRun, b: BenchRun) -> None:
    """Refuse runs that did not answer the same questions about the same volumes with the same truth and reader.

    Raises:
        CompareError: naming the differing fields of run.json, or of the first items that differ.
    """
    names = f"{a.meta.name!r} and {b.meta.name!r}"
    terms_of_both = {
        field: (getattr(a.meta, field), getattr(b.meta, field))
        for field in ("dataset_fingerprint", "split_file", "reader", "question_ids")
    }
    differing = {field: both for field, both in terms_of_both.items() if both[0] != both[1]}
    if differing:
        shown = "; ".join(
            f"{field}: {_short(ours)} against {_short(theirs)}" for field, (ours, theirs) in differing.items()
        )
        tolerant = "; or add rewards.reader=tolerant, which reads all as they are stored"
        raise CompareError(
            f"runs {names} differ in {shown}; evaluate both again with the same test file, question set and reader"
            + (tolerant if differing.keys() == {"reader"} else "")
        )
    ours, theirs = (run.answers.select("example_id", "item_hash") for run in (a, b))
    both = ours.join(theirs, on="example_id", how="full", suffix="_b", coalesce=False)
    lone = both.filter(pl.col("example_id").is_null() | pl.col("example_id_b").is_null())
    if lone.height:
        items = [x or y for x, y in lone.select("example_id", "example_id_b").head(3).iter_rows()]
        raise CompareError(
            f"runs {names}: {lone.height} items are in one run only, e.g. {', '.join(items)}; "
            "evaluate both on the same items"
        )
    changed = both.filter(pl.col("item_hash") != pl.col("item_hash_b"))
    if changed.height:
        item = changed["example_id"][0]
        row_a, row_b = (
            run.answers.row(by_predicate=pl.col("example_id") == item, named=True) for run in (a, b)
        )
        fields = [c for c in HASHED if row_a[c] != row_b[c]]
        shown = "; ".join(f"{c}: {_short(row_a[c])} against {_short(row_b[c])}" for c in fields)
        raise CompareError(
            f"runs {names}: {changed.height} items differ in what they are graded on, e.g. {item}: "
            f"{shown}; evaluate both on the same data"
        )


def compare_graded(a: Graded, b: Graded, settings: CompareConfig, seed: int = 0) -> Comparison:
    """`compare` for runs that are graded already; without IoU where a run was shown the true regions.

    Raises:
        CompareError: the items' hashes differ, or the primary endpoint is unknown.
    """
    if not a.items["item_hash"].sort().equals(b.items["item_hash"].sort()):
        raise CompareError(f"runs {a.meta.name!r} and {b.meta.name!r} were not graded on the same items")
    a, b = on_equal_terms(a, b)
    counts_a, counts_b = count(a.attributes, a.items), count(b.attributes, b.items)
    observed = [e for e in endpoints(counts_a.cells) if e.merge.any()]
    if parse_endpoint(settings.primary_endpoint) not in {(e.measure, e.column) for e in observed}:
        raise CompareError(
            f"compare.primary_endpoint is {settings.primary_endpoint!r}; use one of {', '.join(MEASURES)}, or "
            "measure/column of a column that is not empty (IoU is, where a run was shown the true region)"
        )
    distinct = [e for e in observed if e.column not in SAME_COLUMNS]
    drawn = resample(counts_a.n, counts_b.s - counts_a.s, distinct, settings.bootstrap_draws, seed)
    by_key = {(e.measure, e.column): r for e, r in zip(distinct, drawn, strict=True)}
    resampled = [by_key[e.measure, SAME_COLUMNS.get(e.column, e.column)] for e in observed]
    p_values = {(e.measure, e.column): r.p_value for e, r in zip(observed, resampled, strict=True)}
    corrected = holm_by_measure([p_values])[0]
    differences = tuple(
        _difference(
            e, counts_a.n, counts_a.s, counts_b.s, r, corrected[e.measure, e.column], settings.confidence
        )
        for e, r in zip(observed, resampled, strict=True)
    )
    return Comparison(
        a=a.meta,
        b=b.meta,
        differences=differences,
        n_items=a.items.height,
        n_patients=len(counts_a.patients),
        confidence=settings.confidence,
        draws=settings.bootstrap_draws,
        seed=seed,
        primary_endpoint=settings.primary_endpoint,
    )


def _difference(
    endpoint: Endpoint,
    n: np.ndarray,
    s_a: np.ndarray,
    s_b: np.ndarray,
    resampled: Resampled,
    p_holm: float,
    confidence: float,
) -> Difference:
    n_merged = n @ endpoint.merge
    value_a, value_b = (
        float(value(n_merged.sum(axis=0), (s @ endpoint.merge).sum(axis=0), endpoint.group))
        for s in (s_a, s_b)
    )
    n_patients = int((n_merged.sum(axis=1) > 0).sum())
    methods = (bootstrap_t_interval, jackknife_t_interval, percentile_interval, bca_interval)
    # one patient says nothing about others: every difference remains possible
    intervals = [Interval(-1.0, 1.0) if n_patients < 2 else m(resampled, confidence) for m in methods]
    return Difference(
        measure=endpoint.measure,
        column=endpoint.column,
        a=value_a,
        b=value_b,
        difference=resampled.estimate,
        interval=intervals[0],
        jackknife=intervals[1],
        percentile=intervals[2],
        bca=intervals[3],
        p_value=resampled.p_value,
        p_holm=p_holm,
        n=int(n_merged.sum()),
        n_patients=n_patients,
        se=resampled.se,
    )


def detectable(difference: Difference, patients: int, confidence: float) -> float:
    """The true difference that `patients` patients would show, at this confidence, in `POWER` of all test sets.

    From the standard error of the observed one, which shrinks with the root of the number of patients; normal
    approximation (Cohen 1988, section 2.2).
    """
    quantiles = norm.ppf([(1 + confidence) / 2, POWER])
    return float(quantiles.sum() * difference.se * np.sqrt(difference.n_patients / patients))


def outcome(difference: Difference) -> str:
    """`outcome_of` its interval; `too few patients` below `PATIENTS_FOR_A_CLAIM`."""
    if difference.n_patients < PATIENTS_FOR_A_CLAIM:
        return "too few patients"
    return outcome_of(difference.interval)


def outcome_of(interval: Interval) -> str:
    """`won`, `lost` or `no difference shown`, from B's side, by whether the interval excludes 0."""
    if interval.low > 0:
        return "won"
    return "lost" if interval.high < 0 else "no difference shown"


def corrected(result: str, p_holm: float, confidence: float) -> str:
    """The outcome, and whether Holm's correction takes it back: `won, Holm > 0.05`."""
    fell = result in ("won", "lost") and p_holm > 1 - confidence
    return f"{result}, Holm > {1 - confidence:.2g}" if fell else result


def verdict(comparison: Comparison) -> str:
    """One plain paragraph: who won on balanced accuracy and on mean IoU, apart, and what that rests on."""
    return " ".join(
        [
            f"{comparison.b.name} against {comparison.a.name}, {terms(comparison)}.",
            *different_settings(comparison),
            *(_sentence(comparison, *key) for key in primary_and_usual(comparison)),
            f"The intervals resample patients (bootstrap-t, {comparison.draws:,} draws): they say how this pair of "
            "checkpoints would differ on other patients, and nothing about another training seed.",
            *too_few_patients(comparison),
        ]
    )


def terms(comparison: Comparison) -> str:
    """What both runs answered, and how: items, patients, test file, question set, reader, decoding, setting."""
    a, b = comparison.a, comparison.b
    return (
        f"{comparison.n_items:,} items of {comparison.n_patients:,} patients "
        f"({b.test_words}; {_decodings(a, b)}; {settings_words({b.name: b, a.name: a})})"
    )


def different_settings(comparison: Comparison) -> list[str]:
    """A warning, where the runs were shown or asked different things."""
    if comparison.a.setting_words == comparison.b.setting_words:
        return []
    return ["They differ in what was shown or asked, so the differences are the setting's too."]


def too_few_patients(comparison: Comparison) -> list[str]:
    """A warning, where it is due."""
    if comparison.n_patients >= PATIENTS_FOR_A_CLAIM:
        return []
    return [f"With {comparison.n_patients} patients nothing here should be taken as shown."]


def primary_and_usual(comparison: Comparison) -> list[tuple[str, str]]:
    """(measure, column) of what a verdict is about: the primary endpoint first, then the two that always are."""
    primary = parse_endpoint(comparison.primary_endpoint)
    return list(dict.fromkeys([primary, ("balanced_accuracy", OVERALL), ("iou", OVERALL)]))


MEASURE_NAMES: Mapping[str, str] = {
    "accuracy": "Accuracy",
    "accuracy_macro": "Accuracy (mean over attributes)",
    "balanced_accuracy": "Balanced accuracy",
    "balanced_accuracy_pooled": "Balanced accuracy (grades pooled)",
    "iou": "Mean IoU",
    "strict": "Strict-parse rate",
}


def endpoint_words(comparison: Comparison, measure: str, column: str) -> str:
    """`Mean IoU of Femur`, and whether it is the primary endpoint."""
    where = "" if column == OVERALL else f" of {column}"
    primary = (measure, column) == parse_endpoint(comparison.primary_endpoint)
    mark = f" (the primary endpoint, {_declared(comparison)})" if primary else ""
    return f"{MEASURE_NAMES[measure]}{where}{mark}"


def _declared(comparison: Comparison) -> str:
    """Whether the primary endpoint was chosen before the answers were there."""
    before = {meta.primary_endpoint for meta in (comparison.a, comparison.b)} - {""}
    if before <= {comparison.primary_endpoint}:
        return "declared in the config"
    return f"chosen after the answers were made, when it was {', '.join(sorted(before))}"


def why_empty(comparison: Comparison) -> str:
    """Why an endpoint has no difference."""
    if comparison.a.box_given or comparison.b.box_given:
        return "not comparable, the true box was given"
    return "nothing to compare, the column is empty"


def _sentence(comparison: Comparison, measure: str, column: str) -> str:
    words = endpoint_words(comparison, measure, column)
    difference = comparison.get(measure, column)
    if difference is None:
        return f"{words}: {why_empty(comparison)}."
    return (
        f"{words}: {who(comparison.b.name, outcome(difference))}, {difference.b:.3f} against {difference.a:.3f}, "
        f"difference {signed(difference.difference)} ({comparison.confidence:.0%} interval "
        f"{signed(difference.interval.low)} to {signed(difference.interval.high)})."
    )


def who(name: str, result: str) -> str:
    """`GRPO won`, `GRPO lost`, or that no difference was shown."""
    return f"{name} {result}" if result in ("won", "lost") else result


def signed(number: float) -> str:
    """`+0.012`, `−0.012` or `0.000`: three decimals, never a negative zero."""
    rounded = round(number, 3)
    return "0.000" if rounded == 0 else f"{'+' if rounded > 0 else '−'}{abs(rounded):.3f}"


def _decodings(a: RunMeta, b: RunMeta) -> str:
    if a.decoding_words == b.decoding_words:
        return a.decoding_words
    return f"{b.name}: {b.decoding_words}; {a.name}: {a.decoding_words}"


def _short(content: object) -> str:
    text = repr(content)
    return text if len(text) <= 200 else f"{text[:200]}…"
