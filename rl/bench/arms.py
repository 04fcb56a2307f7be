"""More than two arms, and arms of several training seeds: a reference, and each further arm compared with it.

A pair of runs is compared as `rl.bench.compare` does, and its interval over patients speaks of those two checkpoints.
An arm of several runs is a method, one run for each training seed; runs are paired in the order given. What the
method did is told apart, from the differences of its pairs (`rl.bench.seeds`).

p-values are corrected by Holm's method in two layers that never mix. Pairs: a family is one measure, its columns in
every pair of every comparison; Overall stands apart, a family of the Overall of that measure in every pair. Methods:
the same, with one test for each further arm in place of its pairs. Two runs alone are corrected as ever: over
the columns of a measure, Overall not at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from rl.bench.compare import (
    CompareError,
    Comparison,
    compare_graded,
    different_settings,
    endpoint_words,
    outcome_of,
    primary_and_usual,
    signed,
    terms,
    too_few_patients,
    verdict,
    who,
    why_empty,
)
from rl.bench.endpoints import OVERALL
from rl.bench.holm import holm_by_measure
from rl.bench.metrics import Graded
from rl.bench.seeds import MIN_SEEDS, SeedSummary, seed_summaries
from rl.config import CompareConfig


@dataclass(frozen=True)
class Arm:
    """A model, or a method: its runs, one for each training seed."""

    name: str
    runs: tuple[Graded, ...]


@dataclass(frozen=True)
class ArmComparison:
    """A further arm against the reference."""

    a: str
    """Name of the reference."""
    b: str
    pairs: tuple[Comparison, ...]
    """One for each pair of runs, in the order given."""
    over_seeds: tuple[SeedSummary, ...] = ()
    """What the pairs say of the method; empty for a single pair."""

    def over(self, measure: str, column: str = OVERALL) -> SeedSummary | None:
        """One endpoint over the seeds; None when its column is empty, or for a single pair."""
        return next((s for s in self.over_seeds if (s.measure, s.column) == (measure, column)), None)


def compare_arms(arms: Sequence[Arm], settings: CompareConfig, seed: int = 0) -> list[ArmComparison]:
    """Compare each further arm with the first.

    Every pair is resampled with the same seed, so a comparison does not depend on what it stands beside; only its
    corrected p-values do.

    Raises:
        CompareError: fewer than two arms, arms of different numbers of runs, or what `compare_graded` refuses.
    """
    if len(arms) < 2:
        raise CompareError("a comparison needs at least two arms")
    reference, *further = arms
    for arm in further:
        if len(arm.runs) != len(reference.runs):
            raise CompareError(
                f"{arm.name!r} has {len(arm.runs)} runs and {reference.name!r} has {len(reference.runs)}: they are "
                "paired by seed, so give as many for each arm, in the same order"
            )
    pairs = [
        [compare_graded(a, b, settings, seed) for a, b in zip(reference.runs, arm.runs, strict=True)]
        for arm in further
    ]
    together = iter(
        holm_by_measure(
            [{(d.measure, d.column): d.p_value for d in c.differences} for arm in pairs for c in arm]
        )
    )
    corrected = [tuple(_with_holm(c, next(together)) for c in arm) for arm in pairs]
    over_seeds = seed_summaries(pairs) if len(reference.runs) > 1 else [[] for _ in further]
    return [
        ArmComparison(reference.name, arm.name, of_arm, tuple(summaries))
        for arm, of_arm, summaries in zip(further, corrected, over_seeds, strict=True)
    ]


def _with_holm(comparison: Comparison, p_holm: dict[tuple[str, str], float]) -> Comparison:
    differences = (replace(d, p_holm=p_holm[d.measure, d.column]) for d in comparison.differences)
    return replace(comparison, differences=tuple(differences))


def pairs_of(comparisons: Sequence[ArmComparison]) -> list[Comparison]:
    """Every pair of runs, arm after arm."""
    return [pair for arm in comparisons for pair in arm.pairs]


def verdicts(comparisons: Sequence[ArmComparison]) -> list[str]:
    """A paragraph for each further arm, and one on how to read them where there are several pairs."""
    paragraphs = [
        verdict(arm.pairs[0]) if len(arm.pairs) == 1 else _seeds_verdict(arm) for arm in comparisons
    ]
    pairs = len(pairs_of(comparisons))
    if pairs > 1:
        paragraphs.append(
            "Won and lost go by each interval alone; p-values are in the tables, also corrected by Holm's method over "
            f"{correction(pairs, 'pairs of runs')}."
        )
    return paragraphs


def correction(tests: int, of: str) -> str:
    """What Holm's method covers, in words, when each column is tested in so many pairs of runs, or arms."""
    if tests == 1:
        return "the columns of a measure, Overall apart"
    return f"the columns of a measure in all {tests} {of} together, its Overall in all of them apart"


def _seeds_verdict(arm: ArmComparison) -> str:
    first, seeds = arm.pairs[0], len(arm.pairs)
    keys = primary_and_usual(first)
    if seeds < MIN_SEEDS:
        claim = (
            f"No claim is made about the method: that takes {MIN_SEEDS} training seeds, and here are {seeds} (with one "
            "degree of freedom a t interval reaches 12.7 standard errors to either side)."
        )
    else:
        claim = "The method, trained again:"
    return " ".join(
        [
            f"{arm.b} against {arm.a}, {seeds} training seeds of each, {terms(first)}.",
            *different_settings(first),
            claim,
            *(_over_seeds_sentence(arm, *key) for key in keys),
            "The checkpoints, each pair by itself:",
            *(_pairs_sentence(arm, *key) for key in keys),
            f"The intervals of pairs resample patients (bootstrap-t, {first.draws:,} draws): they say how those two "
            "checkpoints would differ on other patients. An interval over seeds says how the methods would differ "
            "when trained again, on these patients.",
            *too_few_patients(first),
        ]
    )


def _over_seeds_sentence(arm: ArmComparison, measure: str, column: str) -> str:
    words, summary = endpoint_words(arm.pairs[0], measure, column), arm.over(measure, column)
    if summary is None:
        return f"{words}: {why_empty(arm.pairs[0])}."
    mean = f"mean of the differences {signed(summary.mean)}"
    spread = f"standard deviation between seeds {summary.sd:.3f}"
    if summary.interval is None or summary.p_value is None:
        return f"{words}: {mean}, {spread}."
    low, high = signed(summary.interval.low), signed(summary.interval.high)
    return (
        f"{words}: {who(arm.b, outcome_of(summary.interval))}, {mean} ({arm.pairs[0].confidence:.0%} t interval over "
        f"seeds {low} to {high}, df {len(arm.pairs) - 1}, p {p_words(summary.p_value)}; {spread})."
    )


def _pairs_sentence(arm: ArmComparison, measure: str, column: str) -> str:
    found = [pair.get(measure, column) for pair in arm.pairs]
    each = [
        f"#{number} {signed(d.difference)} ({signed(d.interval.low)} to {signed(d.interval.high)})"
        for number, d in enumerate(found, start=1)
        if d is not None
    ]
    return f"{endpoint_words(arm.pairs[0], measure, column)}: {', '.join(each) or why_empty(arm.pairs[0])}."


def p_words(p: float) -> str:
    """`0.012`, or that it is below a thousandth."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"
